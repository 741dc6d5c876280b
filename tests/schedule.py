"""In which order a test run starts its tests, and on which of its workers.

There are three kinds of tests. Those on a Slurm cluster wait most of their time. Those of several ranks keep two cores
busy, and two at once take more than twice as long, because ranks wait for each other in every collective. The rest is
one process each. A worker begins with the tests of its kind, the long ones first, and then helps with the others.
"""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from xdist.scheduler import LoadScopeScheduling

WORKERS = 3
_SLURM, _RANKS, _REST = range(WORKERS)
_KINDS = {
    "tests/slurm": _SLURM,
    "tests/e2e": _RANKS,
    "tests/distributed": _RANKS,
    "tests/training": _RANKS,
    "tests/objectives": _RANKS,
    "tests/checkpoint/": _RANKS,
    "tests/optim": _RANKS,
    "tests/docs/test_tutorial_page.py": _RANKS,
}
# The longest first; what is not named is short.
_LONG = (
    "tests/slurm/test_sweep.py",
    "tests/slurm/test_faults.py",
    "tests/slurm",
    "tests/e2e",
    "tests/distributed",
    "tests/checkpoints_convert",
    "tests/launch",
    "tests/docs",
    "tests/tools/dev/test_benchmarks.py",
    "tests/tools/test_plan.py",
    "tests/tools/scaling/test_fit_recovery.py",
    "tests/objectives/test_cross_entropy_kernels.py",
    "tests/data",
)
# Tests whose steps several processes take beside one another, on a machine that others may load.
_OF_SEVERAL_PROCESSES = (
    *("tests/slurm", "tests/launch", "tests/e2e", "tests/distributed", "tests/docs"),
    "tests/resilience/test_dump_watch.py",
)
# Their tests share nothing but the cluster.
_ONE_BY_ONE = ("tests/slurm/test_faults.py", "tests/slurm/test_run.py", "tests/slurm/test_stops.py")


class Schedule(LoadScopeScheduling):
    """A file is a unit of work, on the cluster a test; units go out by kind and length."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if nodeid.split("::")[0] in _ONE_BY_ONE else nodeid.split("::")[0]

    def _assign_work_unit(self, node: Any) -> None:
        own = int(node.gateway.id.removeprefix("gw")) % WORKERS
        scopes = sorted(self.workqueue, key=lambda scope: (_kind(scope) != own, _kind(scope), _place(scope)))
        self.workqueue.move_to_end(scopes[0], last=False)
        super()._assign_work_unit(node)


def _kind(scope: str) -> int:
    return next((kind for name, kind in _KINDS.items() if scope.startswith(name)), _REST)


def _place(scope: str) -> int:
    return next((place for place, name in enumerate(_LONG) if scope.startswith(name)), len(_LONG))


def may_be_repeated(test: str) -> bool:
    """Whether a failure of a test may have been the machine's: it gets a second try then."""
    return test.startswith(_OF_SEVERAL_PROCESSES)


def table(seconds: dict[str, float]) -> Sequence[str]:
    """Minutes by directory, and the ten slowest tests.

    Args:
        seconds: by test, setup and teardown included.
    """
    directories: dict[str, float] = {}
    for test, taken in seconds.items():
        parts = PurePosixPath(test.split("::")[0]).parts
        name = "/".join(parts[:2]) if len(parts) > 2 else parts[0]
        directories[name] = directories.get(name, 0.0) + taken
    lines = ["minutes by directory, summed over the workers, which run beside each other:"]
    lines += [f"{taken / 60:7.1f}  {name}" for name, taken in sorted(directories.items(), key=lambda item: -item[1])]
    slowest = sorted(seconds.items(), key=lambda item: -item[1])[:10]
    return [*lines, "the ten slowest tests, seconds:", *(f"{taken:7.1f}  {test}" for test, taken in slowest)]
