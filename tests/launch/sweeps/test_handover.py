"""How runs are grouped into the arrays that a cluster takes."""

import pytest

from launch.sweeps.handover import HandOver, Place
from launch.sweeps.study_directory import StudyRun
from megatron_qwen import slurm


def runs(*shapes: str) -> list[StudyRun]:
    return [StudyRun(f"r{index}", "cell", 8, None, 0, (), shape) for index, shape in enumerate(shapes)]


def groups(monkeypatch, largest: int | None, *shapes: str, at_once: int | None = None) -> list[list[str]]:
    """Names of the runs that are submitted together, on a cluster with this MaxArraySize."""
    monkeypatch.setattr(slurm, "largest_array", lambda: largest)
    place = Place("h100_infiniband", nodes=1, ranks_per_node=None, at_once=at_once)
    hand_over = HandOver(None, "tiny_dense", place, None, print, print)
    return [[run.name for run in group] for group in hand_over.groups(runs(*shapes))]


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (None, [["r0", "r2", "r3"], ["r1"]]),
        (1001, [["r0", "r2", "r3"], ["r1"]]),
        (2, [["r0", "r2"], ["r3"], ["r1"]]),
        (1, [["r0"], ["r2"], ["r3"], ["r1"]]),
        (0, [["r0"], ["r2"], ["r3"], ["r1"]]),  # slurm.conf turns arrays off by this
    ],
)
def test_runs_of_a_shape_are_as_many_as_an_array_may_have(largest, expected, monkeypatch):
    assert groups(monkeypatch, largest, "a", "b", "a", "a") == expected


def test_no_array_is_larger_than_what_may_run_at_once(monkeypatch):
    assert groups(monkeypatch, 1001, "a", "a", "a", at_once=2) == [["r0", "r1"], ["r2"]]
