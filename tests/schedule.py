"""In which order a test run starts its tests, and on which of its workers.

Tests on a Slurm cluster wait most of their time and have a cluster a worker; other tests compute. So some workers begin
with the ones that wait and the rest with the ones that compute, the long ones first, and every worker that has nothing
left of its own kind helps with the other.
"""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from xdist.scheduler import LoadScopeScheduling

# Seconds that a file or directory was seen to take, the longest first; what is not named is short.
_LONG = (
    "tests/slurm/test_sweep.py",
    "tests/slurm/test_faults.py",
    "tests/slurm",
    "tests/e2e",
    "tests/distributed",
    "tests/checkpoints_convert",
    "tests/launch",
    "tests/data",
)
_WAITING = ("tests/slurm",)
# Their tests share nothing but the cluster.
_ONE_BY_ONE = ("tests/slurm/test_faults.py", "tests/slurm/test_run.py", "tests/slurm/test_stops.py")


def workers(cores: int) -> int:
    """Workers of a machine: one a core for tests that compute, and as many for tests that wait."""
    return 2 * cores


class Schedule(LoadScopeScheduling):
    """A file a unit of work, on the cluster a test; units by kind and length."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if nodeid.split("::")[0] in _ONE_BY_ONE else nodeid.split("::")[0]

    def _assign_work_unit(self, node: Any) -> None:
        wanted = _takes_waiting_first(node.gateway.id)
        scopes = sorted(self.workqueue, key=lambda scope: (_waits(scope) != wanted, _rank(scope)))
        self.workqueue.move_to_end(scopes[0], last=False)
        super()._assign_work_unit(node)


def _takes_waiting_first(worker: str) -> bool:
    """Every second worker: gw1, gw3, ..."""
    return int(worker.removeprefix("gw")) % 2 == 1


def _waits(scope: str) -> bool:
    return scope.startswith(_WAITING)


def _rank(scope: str) -> int:
    return next((rank for rank, name in enumerate(_LONG) if scope.startswith(name)), len(_LONG))


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
