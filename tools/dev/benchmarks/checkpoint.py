"""``mq bench checkpoint``: what a save costs training, in the background and waited for, on four ranks."""

import statistics
import tempfile

from tools.dev.benchmarks.ranks import measure
from tools.dev.benchmarks.rows import BenchmarkRow, against_peer
from tools.dev.benchmarks.train_step import toy_tokens

_RANKS = 4
_SLOWEST = 1.1  # times a step without a save, for steps during a background save; chosen by hand


def run(*, rounds: int) -> list[BenchmarkRow]:
    """A step while a save is under way against a normal one; a save that is waited for against cp of its files.

    The first counts everything between the start of the save and its commit: copying the tensors aside, writing,
    hashing, committing. The third is what training waits for a local checkpoint, whose copy is on another node.

    Args:
        rounds: blocks of steps of either kind.
    """
    with toy_tokens() as data, tempfile.TemporaryDirectory() as folder:
        found = measure("tools.dev.benchmarks.checkpoint_worker", [str(data), folder, str(rounds)], ranks=_RANKS)
    conditions = f"{_RANKS} ranks, 8,192 tokens a step, {rounds} rounds, {found['bytes'] / 2**20:.0f} MiB"
    normal, saving = statistics.median(found["normal"]), statistics.median(found["saving"])
    each = [plain / busy for plain, busy in zip(found["normal"], found["saving"], strict=True)]
    stall, steps = statistics.median(found["stalls"]), statistics.median(found["steps"])
    copies = [copied / waited for copied, waited in zip(found["copied"], found["waited"], strict=True)]
    begins = f"the call that starts it takes {stall:.2f} s, {steps:.0f} steps until the commit"
    return [
        against_peer(
            "step while a checkpoint is saved",
            each,
            ours=saving,
            against=normal,
            unit="s",
            peer="step without a save",
            required=1 / _SLOWEST,
            conditions=f"{conditions}; {begins}",
        ),
        against_peer(
            "save that training waits for",
            copies,
            ours=statistics.median(found["waited"]),
            against=statistics.median(found["copied"]),
            unit="s",
            peer="cp of its files and sync",
            required=0.0,
            conditions=conditions,
        ),
        against_peer(
            "local checkpoint",
            [waited / local for waited, local in zip(found["waited"], found["local"], strict=True)],
            ours=statistics.median(found["local"]),
            against=statistics.median(found["waited"]),
            unit="s",
            peer="save that training waits for",
            required=1.0,
            conditions=f"{conditions}; written on two nodes after {statistics.median(found['local_written']):.2f} s",
        ),
    ]
