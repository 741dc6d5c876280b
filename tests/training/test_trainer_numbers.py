"""Steps that are skipped leave weights, moments and schedule alone and move the data on; counters count."""

import math

import pytest
import yaml

from tests.distributed.layouts import PP2
from tests.training import ranks
from tests.training.cases import BATCH, LENGTH, RATES, STEPS, config_of, in_micro_batches, twin_of
from tests.training.reference import batch


@pytest.fixture(scope="module")
def without_the_second(starts, documents):
    """Losses of a twin that never sees the second batch: its second update is by the third, at the second rate."""
    twin, found = twin_of("tiny_dense", starts["tiny_dense"]), {}
    config = config_of("tiny_dense", documents)
    for number, rate in zip((1, 3, 4, 5), RATES, strict=False):
        found[number] = twin.step(in_micro_batches(batch(config, documents, step=number)), rate=rate)
    return found


# One rank of two learns from the other that the loss is not finite; under PP2 the first has none of its own.
@pytest.mark.parametrize(
    ("what", "size", "layout", "poisoned"),
    [("loss", 1, {}, 0), ("loss", 2, {}, 1), ("loss", 2, PP2, 1), ("gradient", 1, {}, 0)],
    ids=["loss", "loss, DP2", "loss, PP2", "gradient"],
)
def test_a_skipped_step_takes_its_batch_and_nothing_else(
    what, size, layout, poisoned, pool, starts, documents, without_the_second, tmp_path
):
    """A loss that is not finite skips the step though every gradient is finite, and the other way about."""
    config = config_of("tiny_dense", documents, starts["tiny_dense"], parallel=layout)
    for answer in pool[size].run(ranks.steps_with_bad_ones, config, tmp_path, {2: what}, poisoned):
        steps = answer["steps"]
        assert math.isfinite(steps[1]["loss"]) == (what == "gradient")
        assert math.isfinite(steps[1]["grad_norm"]) == (what == "loss")
        assert [step["skipped"] for step in steps] == [False, True, False, False, False]
        digests = [step["digest"] for step in steps]
        assert digests[1] == digests[0]
        assert len(set(digests)) == 4
        assert [step["iteration"] for step in steps] == [1, 2, 3, 4, 5]
        assert [step["schedule_iteration"] for step in steps] == [1, 1, 2, 3, 4]
        assert [step["skipped_iterations"] for step in steps] == [0, 1, 1, 1, 1]
        assert [step["updates"] for step in steps] == [1, 1, 2, 3, 4]  # before_optimizer_step
        assert [step["consecutive_skips"] for step in steps] == [0, 1, 0, 0, 0]
        assert [step["consumed_samples"] for step in steps] == [8, 16, 24, 32, 40]
        assert [step["consumed_tokens"] for step in steps] == [512, 1024, 1536, 2048, 2560]
        # The rate of the second step is offered again.
        rates = [RATES[0], RATES[1], RATES[1], RATES[2], RATES[3]]
        assert [step["learning_rate"] for step in steps] == pytest.approx(rates, rel=1e-12)
        for number, (loss, norm) in without_the_second.items():
            assert steps[number - 1]["loss"] == pytest.approx(loss, rel=2e-6)
            assert steps[number - 1]["grad_norm"] == pytest.approx(norm, rel=2e-5)


def test_so_many_skips_in_a_row_end_the_run_with_17(pool, starts, documents, tmp_path):
    """Not the third skip of the run, but the second in a row, whichever number is not finite."""
    changes = {"resilience": {"max_consecutive_skips": 2}, "training": {"train_iters": 7}}
    config = config_of("tiny_dense", documents, starts["tiny_dense"], **changes)
    bad = {1: "loss", 3: "gradient", 5: "loss", 6: "gradient"}
    (answer,) = pool[1].run(ranks.steps_with_bad_ones, config, tmp_path, bad, 0)
    assert [step["skipped"] for step in answer["steps"]] == [True, False, True, False, True, True]
    assert [step["consecutive_skips"] for step in answer["steps"]] == [1, 0, 1, 0, 1, 2]
    assert answer["steps"][-1]["skipped_iterations"] == 4
    assert answer["exit_code"] == 17
    assert "2 steps in a row were not finite" in answer["message"]


def test_one_skip_less_than_the_limit_goes_on(pool, starts, documents, tmp_path):
    config = config_of("tiny_dense", documents, starts["tiny_dense"], resilience={"max_consecutive_skips": 4})
    (answer,) = pool[1].run(ranks.steps_with_bad_ones, config, tmp_path, dict.fromkeys((2, 3, 4), "loss"), 0)
    assert [step["consecutive_skips"] for step in answer["steps"]] == [0, 1, 2, 3, 0]
    assert (answer["exit_code"], answer["message"]) == (0, None)
    assert len(answer["steps"]) == STEPS


def test_tokens_of_stages_of_another_length_and_batch(pool, starts, documents, tmp_path):
    """512 tokens a step twice, then 4 x 32 = 128 a step."""
    blend = {
        "sources": {"text": {"path": str(documents.prefix)}},
        "stages": [
            {"name": "long", "tokens": 2 * BATCH * LENGTH, "weights": {"text": 1}},
            {"name": "short", "weights": {"text": 1}, "seq_length": 32, "global_batch_size": 4},
        ],
    }
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump(blend))
    data = {"path": None, "blend": str(tmp_path / "blend.yaml")}
    config = config_of("tiny_dense", documents, starts["tiny_dense"], data=data)
    for steps in pool[2].run(ranks.steps_with_callbacks, config, tmp_path, []):
        assert [step["consumed_tokens"] for step in steps] == [512, 1024, 1152, 1280, 1408]
        assert [step["consumed_samples"] for step in steps] == [8, 16, 20, 24, 28]
        assert [step["weight"] for step in steps] == [512, 512, 128, 128, 128]
