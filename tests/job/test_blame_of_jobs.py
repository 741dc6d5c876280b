"""From what srun, ranks, Slurm and counters say of forty jobs to whose fault it was, without a cluster."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from megatron_qwen.attempts import Attempt
from megatron_qwen.job.first_failure import first_failure, nodes_to_blame
from megatron_qwen.job.ranks import parse_task_ends
from megatron_qwen.job.verdict import Evidence, judge
from megatron_qwen.resilience.blame import Fault
from megatron_qwen.resilience.policy import AttemptOutcome, Decision, decide
from megatron_qwen.resilience.rank_end import RankEnd, is_hardware_failure

NODES = tuple(f"n{number}" for number in range(1, 13))
RANKS = 4  # of a node
GLOO = "RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.3]:33297"
STALE = "OSError: [Errno 116] Stale file handle: '/runs/a/checkpoints/x'"


@dataclass
class End:
    """What is left of an attempt.

    Args:
        said: by srun.
        first: messages of the ranks that failed by themselves: rank to exit code, error and message.
        silent: ranks without a record.
        found: by the counters.
        down: nodes, as Slurm reports them.
        storage: what is wrong with the run's file system.
    """

    said: str = ""
    first: dict[int, tuple[int, str, str]] = field(default_factory=dict)
    silent: tuple[int, ...] = ()
    found: dict[str, list[str]] = field(default_factory=dict)
    down: tuple[str, ...] = ()
    storage: str | None = None


class Run:
    """Attempts of a run on six of twelve nodes, each decided about by what is left of it.

    Args:
        seed: of all that is drawn.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.attempts: list[Attempt] = []
        self.decision: Decision | None = None

    def nodes(self) -> list[str]:
        avoided = self.decision.exclude if self.decision is not None else ()
        return sorted(self.random.sample([node for node in NODES if node not in avoided], 6), key=NODES.index)

    def ends(self, nodes: list[str], end: End) -> None:
        places = {rank: nodes[rank // RANKS] for rank in range(6 * RANKS)}
        records = [
            RankEnd(rank, code, message, error, 0.0, is_hardware_failure(message))
            for rank, (code, error, message) in end.first.items()
        ]
        others = [rank for rank in places if rank not in end.first and rank not in end.silent]
        self.random.shuffle(others)
        records += [RankEnd(rank, 76, GLOO, "RuntimeError at c.py:1", 1.0) for rank in others]
        said = end.said + "".join(
            f"srun: error: {places[rank]}: task {rank}: Exited with exit code 76\n" for rank in others
        )
        evidence = Evidence(
            76, parse_task_ends(said), records, places, down_nodes=end.down, storage=end.storage, directory="/runs/a"
        )
        verdict = judge(evidence)
        found = first_failure(evidence, verdict, said=said, seconds=60.0, found=end.found)
        saved, gained = 10 * len(self.attempts) + 10, self.random.randint(5, 400)
        failed = nodes_to_blame(verdict, found)
        outcome = AttemptOutcome(
            verdict.reason, verdict.detail, failed, verdict.error, saved, gained, saved, found, len(nodes)
        )
        self.decision = decide(self.attempts, outcome, max_restarts_without_progress=3)
        self.attempts.append(
            Attempt(
                len(self.attempts) + 1,
                "2026-01-01T00:00:00+00:00",
                tuple(nodes),
                reason=str(verdict.reason),
                gained=gained,
                saved=saved,
                iteration=saved,
                failed_nodes=failed,
                error=verdict.error,
                evidence=None if found is None else found.as_dict(),
            )
        )


def killed(rank: int, nodes: list[str], how: str = "Killed") -> End:
    return End(f"srun: error: {nodes[rank // RANKS]}: task {rank}: {how}\n", silent=(rank,))


def of_program(run: Run, form: int) -> None:
    rank = run.random.randrange(6 * RANKS)
    for _ in range(4):
        nodes = run.nodes()
        other = run.random.randrange(6 * RANKS)
        run.ends(
            nodes,
            (
                killed(rank, nodes),
                killed(rank, nodes, "Segmentation fault (core dumped)"),
                killed(other, nodes, "Out Of Memory"),
                killed(other, nodes, "Exited with exit code 13"),
                End(first={other: (1, "ValueError at a.py:9", "ValueError: bad shape")}),
            )[form],
        )


def of_node(run: Run, form: int) -> None:
    bad = run.random.choice(NODES)
    for _ in range(40):
        if run.decision is not None and bad in run.decision.exclude:
            return
        nodes = run.nodes()
        if bad not in nodes:
            continue
        first = nodes.index(bad) * RANKS
        rank = first + run.random.randrange(RANKS)
        own = tuple(range(first, first + RANKS))
        run.ends(
            nodes,
            (
                killed(rank, nodes),
                End(f"srun: error: {bad}: tasks {first}-{first + RANKS - 1}: Killed\n", silent=own),
                End(first={rank: (1, "RuntimeError at b.py:2", "CUDA error: uncorrectable ECC error encountered")}),
                End(found={bad: ["Xid 79"]}),
                End(f"srun: error: Node failure on {bad}\n", silent=own, down=(bad,)),
            )[form],
        )


def of_storage(run: Run, form: int) -> None:
    for _ in range(3):
        nodes = run.nodes()
        rank = run.random.randrange(6 * RANKS)
        full = "OSError: [Errno 28] No space left on device: '/runs/a/metrics.jsonl'"
        run.ends(
            nodes,
            (
                End(storage="Read-only file system in /runs/a"),
                End(first={rank: (1, "OSError at d.py:3", full)}),
                End(first={(7 * len(run.attempts)) % 24: (1, "OSError at d.py:3", STALE)}),
                End(storage="No space left on device in /runs/a", first={rank: (3, "DataError", "cut off")}),
                End(first={(5 * len(run.attempts)) % 24: (4, "CheckpointError", STALE)}),
            )[form],
        )


def of_network(run: Run, form: int) -> None:
    for number in range(3):
        nodes = run.nodes()
        first, peer = nodes[number % 2], nodes[3 + number]
        said = f"NCCL error: unhandled system error, Connection closed by remote peer {peer}<45678>"
        rank = nodes.index(first) * RANKS
        link = "mlx5_0/1_link_downed +1"
        run.ends(
            nodes,
            (
                End(),
                End(first={rank: (76, "RuntimeError at c.py:1", said)}),
                End(found={first: [link], peer: [link]}),
                End(first={rank: (76, "RuntimeError at c.py:1", "client socket has timed out")}),
                End(found={node: [link] for node in nodes}),
            )[form],
        )


CAUSES: dict[Fault, Callable[[Run, int], None]] = {
    Fault.PROGRAM: of_program,
    Fault.NODE: of_node,
    Fault.STORAGE: of_storage,
    Fault.NETWORK: of_network,
}


def test_forty_jobs():
    wrong = []
    for cause, happens in CAUSES.items():
        for seed in range(10):
            run = Run(seed)
            happens(run, seed % 5)
            assert run.decision is not None
            assert run.decision.blame is not None
            if run.decision.blame.fault is not cause:
                wrong.append((cause, seed, run.decision))
            assert len(run.decision.exclude) == (cause is Fault.NODE), (cause, seed, run.decision)
    assert len(wrong) <= 2, wrong


@pytest.mark.parametrize("cause", [Fault.PROGRAM, Fault.STORAGE])
def test_faults_that_cost_no_node(cause):
    """Whatever is drawn: at no moment of a run is a node avoided for the program's or the storage's fault."""
    avoided = 0
    for seed in range(10, 210):
        run = Run(seed)
        CAUSES[cause](run, seed % 5)
        assert run.decision is not None
        avoided += bool(run.decision.exclude)
    assert avoided == 0
