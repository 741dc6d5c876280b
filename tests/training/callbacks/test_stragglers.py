"""One slow rank of several is named by its own clock; ranks that only wait for it are not."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_qwen.checkpoint.paths import committed
from megatron_qwen.config.resilience import ResilienceConfig
from megatron_qwen.config.run import RunConfig
from megatron_qwen.resilience.straggler_leave import read_slow_nodes
from megatron_qwen.resilience.stragglers import RankTimes
from megatron_qwen.rundir import RunDirectory
from megatron_qwen.training.callbacks.stragglers import _comparable, _times_of_ranks, window_steps
from megatron_qwen.training.rank_places import RankPlace, places_of_ranks
from tests import tiers
from tests.training.attempts import configure
from tests.training.callbacks.slow_ranks import (
    leave_with_slow_rank,
    named_in,
    pids,
    stopped_most_of_the_time,
    train_with_pauses,
    train_with_slow_rank,
)

_RANKS = tiers.count(quick=4, thorough=8)  # of two cores, in CI
_SLOW, _WITHIN = _RANKS - 3, 20


def run(pool, tokens: Path, run_dir: Path, *, steps: int, slow: int | None, factor: float = 1.0, begin: int = 0):
    """Records of metrics.jsonl."""
    config = configure(
        "tiny_dense", tokens, f"training.train_iters={steps}", f"training.global_batch_size={_RANKS}",
        "training.micro_batch_size=1", "training.eval_iters=0", "checkpoint.save_interval=0",
        "metrics.tensorboard=false",
    )  # fmt: skip
    directory = RunDirectory(run_dir)
    directory.claim(config)
    directory.checkpoints.mkdir()
    directory.begin_attempt(world_size=_RANKS)
    codes = pool[_RANKS].run(train_with_slow_rank, config, run_dir, slow, factor, begin, timeout_s=900)
    assert codes == [0] * _RANKS
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("factor", tiers.cases([2.0], [1.5, 6.0]))
def test_a_rank_that_computes_more_is_named(factor, pool, tokens, tmp_path):
    records = run(pool, tokens, tmp_path / "run", steps=_WITHIN, slow=_SLOW, factor=factor)
    assert list(named_in(records)) == [_SLOW]


@pytest.mark.parametrize("factor", tiers.cases([3.0], [1.5, 2.0, 6.0]))
def test_a_rank_that_is_stopped_most_of_the_time_is_named(factor, pool, tokens, tmp_path):
    with stopped_most_of_the_time(pids(pool[_RANKS])[_SLOW], factor=factor):
        records = run(pool, tokens, tmp_path / "run", steps=_WITHIN, slow=None)
    assert list(named_in(records)) == [_SLOW]


def test_nobody_is_named_where_nobody_is_slow(pool, tokens, tmp_path):
    records = run(pool, tokens, tmp_path / "run", steps=tiers.count(quick=20, thorough=1000), slow=None)
    assert named_in(records) == {}


def two_ranks(tokens: Path, run_dir: Path, *overrides: str) -> tuple[RunConfig, RunDirectory]:
    """A run that has begun."""
    config = configure(
        "tiny_dense", tokens, "training.train_iters=20", "training.global_batch_size=2", "training.micro_batch_size=1",
        "training.eval_iters=0", "metrics.tensorboard=false", *overrides,
    )  # fmt: skip
    directory = RunDirectory(run_dir)
    directory.claim(config)
    directory.checkpoints.mkdir()
    directory.begin_attempt(world_size=2)
    return config, directory


@pytest.mark.parametrize("slow", tiers.cases([0], [1]))
def test_work_between_steps_counts_on_rank_0_too(slow, pool, tokens, tmp_path):
    """A save in each window does not."""
    config, directory = two_ranks(tokens, tmp_path / "run", "checkpoint.save_interval=5")
    assert pool[2].run(train_with_pauses, config, directory.path, slow) == [0, 0]
    records = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    assert list(named_in(records)) == [slow]
    assert {one["cause"] for record in records for one in record.get("stragglers", ())} == {"host"}


@pytest.mark.parametrize("action", tiers.cases(["requeue"], ["log"]))
def test_ranks_leave_a_slow_node_together_where_they_are_told_to(action, pool, tokens, tmp_path):
    config, directory = two_ranks(tokens, tmp_path / "run", f"resilience.straggler_action={action}")
    codes = pool[2].run(leave_with_slow_rank, config, directory.path, 1, 4.0)
    found, saved = read_slow_nodes(directory.logs(1)), [number for number, _ in committed(directory.checkpoints)]
    if action == "log":
        assert (codes, found, saved) == ([0, 0], None, [20])
        return
    assert codes == [75, 75]
    assert saved == [15], "it saved the step after which it left"
    assert found is not None
    assert found.nodes == (os.uname().nodename,)
    assert "rank 1 on" in found.detail


def test_ranks_that_share_cores_are_not_blamed_for_that():
    times = RankTimes(compute=0.2, data=0.15, host=0.0, cores=0.4, communication=0.2, step=1.0)
    assert _comparable(times, RankPlace(crowded=False)) == times
    assert _comparable(times, RankPlace(crowded=True)) == times._replace(cores=0.0, data=pytest.approx(0.05))
    assert all(map(math.isnan, _comparable(times, RankPlace(crowded=True, sees_queue=False))))


def test_on_a_gpu_the_probe_tells_how_fast_a_rank_computes():
    """Four ranks in steps of 1 s; the third waits 0.4 s for data, the fourth computes at half the speed."""
    rows = [[0.9, 0.0, 0.0, 0.0, 0.0, 1.0, 2e-3]] * 2
    rows += [[0.5, 0.4, 0.0, 0.0, 0.0, 1.0, 2e-3], [0.9, 0.0, 0.0, 0.0, 0.0, 1.0, 4e-3]]
    times = _times_of_ranks(rows)
    assert [one.own for one in times] == pytest.approx([0.6, 0.6, 1.0, 1.2])
    assert all(math.isnan(one.communication) for one in times)
    assert [one.compute for one in _times_of_ranks([[*row[:-1], math.nan] for row in rows])] == [0.9, 0.9, 0.5, 0.9]


def places_of_two() -> list[RankPlace]:
    """Of two ranks on one core each, then on one core together."""
    cores, rank = sorted(os.sched_getaffinity(0)), dist.get_rank()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
        apart = places_of_ranks(dist.group.WORLD, stage=rank)
        os.sched_setaffinity(0, {cores[0]})
        return [*apart, *places_of_ranks(dist.group.WORLD, stage=0)]
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def test_ranks_know_whether_they_share_cores(pool):
    found = pool[2].run(places_of_two)
    assert found[0] == found[1]
    assert [place.crowded for place in found[0]] == [False, False, True, True]
    assert [place.stage for place in found[0]] == [0, 1, 0, 0]


def test_windows_are_longer_where_rank_0_has_many_ranks_to_score():
    assert [window_steps(ResilienceConfig(), ranks) for ranks in (2, 2500, 3000, 10_000)] == [5, 5, 6, 20]
    assert window_steps(ResilienceConfig(straggler_interval=50), 10_000) == 50
