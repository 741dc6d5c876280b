"""Which checkpoints are kept."""

from megatron_qwen.checkpoint.paths import MANIFEST, committed, iteration_dir, temporary_dir
from megatron_qwen.checkpoint.retain import clear_abandoned, prune, superseded


def test_keeps_the_last_and_the_multiples():
    every = list(range(100, 1100, 100))
    assert superseded(every, keep_last=2, keep_every=500) == [100, 200, 300, 400, 600, 700, 800]
    assert superseded(every, keep_last=1, keep_every=None) == every[:-1]
    assert superseded([100], keep_last=3, keep_every=None) == []


def test_what_is_kept_at_an_iteration_that_was_not_saved():
    """Its numbers were not finite, and the next step was saved."""
    assert superseded([101, 150, 200, 300], keep_last=1, keep_every=None, keep_at=[100, 200]) == [150]
    assert superseded([100, 101, 300], keep_last=1, keep_every=None, keep_at=[100, 400]) == [101]


def test_prune_and_clear_touch_nothing_else(tmp_path):
    for iteration in (10, 20, 30):
        iteration_dir(tmp_path, iteration).mkdir()
        (iteration_dir(tmp_path, iteration) / MANIFEST).write_text("{}")
    temporary_dir(tmp_path, 40, 1).mkdir()
    (tmp_path / "iter_mine").mkdir()
    prune(tmp_path, newest=20, keep_last=1, keep_every=10_000)
    assert [iteration for iteration, _ in committed(tmp_path)] == [30, 20], "a later one is left alone"
    prune(tmp_path, newest=30, keep_last=1, keep_every=10_000)
    assert [iteration for iteration, _ in committed(tmp_path)] == [30]
    clear_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000030", "iter_mine"]
