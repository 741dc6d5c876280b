"""A dry run of a longer run says what the length does to the rate, before anything is submitted."""

from dataclasses import replace

import pytest

from launch import request as requests
from launch.preflight import check


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["training.train_iters=16"], "To keep the old schedule: optim.lr_decay_iters=8."),
        (["training.train_iters=16", "optim.lr_decay_iters=8"], None),
        ([], None),
    ],
)
def test_a_longer_run(words, told, finished_run):
    """The finished run has taken 8 steps of 8."""
    request = requests.make(str(finished_run / "run.yaml"), words, nodes=1, cluster="cpu", dry=True)
    request = replace(request, run_dir=finished_run)
    found = [str(item) for item in check(request, on_site=False).findings if "schedule" in str(item)]
    assert len(found) == (told is not None), found
    assert told is None or told in found[0]


def test_a_branch_is_compared_with_the_checkpoint_that_it_starts_from(finished_run, tmp_path):
    checkpoint = finished_run / "checkpoints" / "iter_0000008"
    for path in (finished_run, finished_run / "checkpoints", checkpoint):
        words = ["training.train_iters=16", f"checkpoint.branch_from={path}"]
        request = requests.make(str(finished_run / "run.yaml"), words, nodes=1, cluster="cpu", dry=True)
        request = replace(request, run_dir=tmp_path / "branch")
        (found,) = [str(item) for item in check(request, on_site=False).findings if "schedule" in str(item)]
        assert "the learning rate of step 9 is" in found
        assert "training.train_iters=16 (before: 8)" in found
