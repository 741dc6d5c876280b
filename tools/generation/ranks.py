"""Local ranks of a program that answers under a layout."""

import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


def start_ranks(program: str, source: Path, arguments: Sequence[str], ranks: int, *, talks: bool = False) -> int:
    """Runs a program once a rank on this machine, and returns the exit code of the one that failed first, else 0.

    Args:
        program: module.
        source: that it loads.
        arguments: of its command line.
        ranks: how many.
        talks: whether rank 0 reads what is typed here.
    """
    from megatron_qwen.job.local_ranks import LocalRanks

    with tempfile.TemporaryDirectory(prefix="mq-ranks-") as folder:
        started = LocalRanks(source, world_size=ranks, log_dir=Path(folder), program=(program, *arguments), talks=talks)
        return started.run()


def set_up_log(*, rank: int) -> None:
    """Warnings on stderr, and what rank 0 does where a person looks."""
    level = logging.INFO if rank == 0 and sys.stderr.isatty() else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
