"""One bit of one rank: what the next check finds, whom it names, and that the run ends as if nothing had been."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_qwen.checkpoint.paths import committed, iteration_dir
from megatron_qwen.config.run import RunConfig
from megatron_qwen.rundir import RunDirectory
from tests.distributed import jobs
from tests.tiers import THOROUGH, cases, count
from tests.training.attempts import configure
from tests.training.integrity.flips import Flip, attempt

# A spike is one against sixteen values at least, so the faults are in the last four steps.
STEPS, EVERY, RANKS = 20, 16, 2
# The exponents of gradients are below that of 2, whose highest bit is 0 then: flipped, it makes them 2**128 times as
# large. The next bits are 1 there and would make a gradient vanish, which no spike shows.
HIGHEST_EXPONENT_BIT = 30


def config_of(tokens: Path, *more: str) -> RunConfig:
    length = [f"training.train_iters={STEPS}", f"checkpoint.save_interval={EVERY}", "data.seq_length=32"]
    # Two micro-batches a rank: gradients are hit between them.
    small = [f"training.global_batch_size={2 * RANKS}", "training.eval_iters=0", "metrics.tensorboard=false"]
    return configure("tiny_dense", tokens, *length, *small, "resilience.optimizer_check_parts=1", *more)


def run_of(pool, config: RunConfig, run_dir: Path, flip: Flip | None) -> list[dict]:
    RunDirectory(run_dir).claim(config)
    return pool[RANKS].run(attempt, config, run_dir, flip)


def final(run_dir: Path) -> dict[str, str]:
    return jobs.tensor_hashes(iteration_dir(run_dir / "checkpoints", STEPS))


@pytest.fixture(scope="module")
def undisturbed(pool, tokens, tmp_path_factory) -> dict[str, str]:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    off = ("resilience.weight_check_interval=0", "resilience.spike_threshold=0")
    assert run_of(pool, config_of(tokens, *off), run_dir, None) == [{"code": 0}] * RANKS
    return final(run_dir)


def drawn(where: str, number: int, *, always: bool = False) -> Flip:
    """The n-th random flip, in the last steps: a checkpoint is there by then."""
    source = random.Random(f"{where} {number} {always}")
    bit = HIGHEST_EXPONENT_BIT if where == "gradients" else source.randrange(32)
    moment = "between steps" if where == "optimizer" else source.choice(["between steps", "forward"])
    return Flip(where, source.randrange(RANKS), source.randint(EVERY + 1, STEPS), source.random(), bit, always, moment)


STATE_FLIPS = [drawn(where, number) for where in ("weights", "optimizer") for number in range(20)]


@pytest.mark.parametrize(
    "flip", cases([STATE_FLIPS[0], STATE_FLIPS[20]], [*STATE_FLIPS[1:20], *STATE_FLIPS[21:]]), ids=str
)
def test_a_changed_state_is_found_and_the_run_ends_as_if_undisturbed(flip, undisturbed, pool, tokens, tmp_path):
    config, run_dir = config_of(tokens), tmp_path / "run"
    ends = run_of(pool, config, run_dir, flip)
    assert [end["code"] for end in ends] == [76] * RANKS
    assert {end["suspects"] for end in ends} == {(flip.rank,)}
    # The next check is the one before the update of the step that meets it.
    assert f"in iteration {flip.iteration}," in ends[0]["message"]
    assert "changed since the last update wrote it" in ends[0]["message"]
    assert [iteration for iteration, _ in committed(run_dir / "checkpoints")] == [EVERY]
    if THOROUGH or flip.where == "weights":  # without the rank's node
        assert pool[RANKS].run(attempt, config, run_dir, None) == [{"code": 0}] * RANKS
        assert final(run_dir) == undisturbed


def test_unchecked_it_ends_as_done_with_other_weights(undisturbed, pool, tokens, tmp_path):
    off = ("resilience.weight_check_interval=0", "resilience.spike_threshold=0")
    ends = run_of(pool, config_of(tokens, *off), tmp_path / "run", replace(STATE_FLIPS[0], bit=20))
    assert ends == [{"code": 0}] * RANKS
    assert final(tmp_path / "run") != undisturbed


@pytest.mark.parametrize("number", range(count(quick=1, thorough=20)))
def test_a_transient_fault_is_computed_again(number, undisturbed, pool, tokens, tmp_path):
    flip = drawn("gradients", number)
    assert run_of(pool, config_of(tokens), tmp_path / "run", flip) == [{"code": 0}] * RANKS
    found = RunDirectory(tmp_path / "run").metrics.read_text().splitlines()
    (named,) = [line for line in found if "transient fault" in line]
    assert f'"iteration":{flip.iteration},' in named
    assert f'"spike_cause":"transient fault","spike_ranks":[{flip.rank}]' in named
    assert final(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("number", range(count(quick=1, thorough=20)))
def test_a_fault_that_stays_is_told_from_data(number, undisturbed, pool, tokens, tmp_path):
    flip, config = drawn("gradients", number, always=True), config_of(tokens)
    ends = run_of(pool, config, tmp_path / "run", flip)
    assert [end["code"] for end in ends] == [76] * RANKS
    assert {end["suspects"] for end in ends} == {(flip.rank,)}
    assert "gives another result on another rank" in ends[0]["message"]
    if THOROUGH:
        assert pool[RANKS].run(attempt, config, tmp_path / "run", None) == [{"code": 0}] * RANKS
        assert final(tmp_path / "run") == undisturbed


LAYOUTS = {
    "TP2 x DP2": ("tiny_dense", ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
    # Experts see the tokens of two ranks in another order after the exchange of slices: no bits to compare.
    "PP2 x EP2": ("tiny_moe", ["parallel.pipeline_model_parallel_size=2", "parallel.expert_model_parallel_size=2"]),
}


@pytest.mark.parametrize("layout", cases([], list(LAYOUTS)))
@pytest.mark.parametrize("where", ["weights", "gradients"])
def test_one_rank_of_a_layout_is_named(where, layout, pool, tokens, tmp_path):
    recipe, words = LAYOUTS[layout]
    length = ["training.train_iters=5", "data.seq_length=32", "training.global_batch_size=4", "training.eval_iters=0"]
    config = configure(recipe, tokens, *length, *words)
    RunDirectory(tmp_path / "run").claim(config)
    ends = pool[4].run(attempt, config, tmp_path / "run", Flip(where, 2, 4, 0.4, HIGHEST_EXPONENT_BIT, always=True))
    assert [(end["code"], end["suspects"]) for end in ends] == [(76, (2,))] * 4


MODES = {
    "dropout": ["model.hidden_dropout=0.1"],
    "overlapped": ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
    "bf16": ["precision.dtype=bf16"],
}


@pytest.mark.parametrize("mode", cases(["overlapped"], ["dropout", "bf16"]))
def test_steps_that_are_computed_again_change_nothing(mode, pool, tokens, tmp_path):
    ends = {}
    for name, every in (("once", 0), ("again", 1)):
        config = config_of(tokens, *MODES[mode], f"resilience.rerun_interval={every}")
        config = config.with_section("training", train_iters=5)
        assert run_of(pool, config, tmp_path / name, None) == [{"code": 0}] * RANKS
        ends[name] = jobs.tensor_hashes(iteration_dir(tmp_path / name / "checkpoints", 5))
    assert ends["once"] == ends["again"]


@pytest.mark.parametrize("number", range(count(quick=0, thorough=5)))
def test_a_low_bit_of_a_gradient_is_found_by_computing_every_step_twice(number, undisturbed, pool, tokens, tmp_path):
    flip = replace(drawn("gradients", number), bit=3)
    config = config_of(tokens, "resilience.rerun_interval=1")
    assert run_of(pool, config, tmp_path / "run", flip) == [{"code": 0}] * RANKS
    assert f'"spike_ranks":[{flip.rank}]' in RunDirectory(tmp_path / "run").metrics.read_text()
    assert final(tmp_path / "run") == undisturbed


@pytest.mark.skipif(not THOROUGH, reason="2,000 steps: the thorough tier")
def test_no_false_alarm_in_two_thousand_steps(pool, tokens, tmp_path):
    steps = 2000
    config = config_of(tokens).with_section("training", train_iters=steps)
    config = config.with_section("checkpoint", save_interval=500)
    RunDirectory(tmp_path / "run").claim(config)
    assert pool[RANKS].run(attempt, config, tmp_path / "run", None, timeout_s=3000) == [{"code": 0}] * RANKS
    records = RunDirectory(tmp_path / "run").metrics.read_text().splitlines()
    assert len(records) == steps
    assert not any("fault" in record for record in records)
    shutil.rmtree(tmp_path / "run")
