"""What a run will read, against what it then reads."""

import json

import pytest

from megatron_qwen.config.batch_size import global_batch_size
from megatron_qwen.data.reading.reading_plan import plan, warnings
from megatron_qwen.data.reading.training_data import TrainingData
from tests.data.blends import run_config, write_source


@pytest.fixture
def config(tmp_path):
    for name, total in (("a", 1000), ("b", 3000)):
        write_source(tmp_path / name, total)
    blend = {
        "sources": {"a": {"path": "a", "max_epochs": 1}, "b": {"path": "b"}},
        "stages": [
            {"name": "one", "tokens": 1000, "weights": {"a": 1, "b": 1}, "seq_length": 16},
            {"name": "two", "tokens": 2000, "weights": {"b": 1}, "seq_length": 50, "global_batch_size": 6},
        ],
    }
    return run_config(tmp_path, blend, global_batch_size=8, rampup_batch_size=(4, 4, 24), train_iters=20)


def take(data: TrainingData, steps: int, consumed: int = 0) -> int:
    for _ in range(steps):
        consumed += global_batch_size(consumed, data.at(consumed).config.training)
    return consumed


def test_what_is_planned_is_what_is_read(config):
    data = TrainingData(config)
    stages = plan(data)
    consumed = take(data, 20)
    records = data.ledger(consumed)
    assert [(stage.name, stage.samples, stage.tokens) for stage in stages] == [
        (record.stage, record.samples, record.samples * record.seq_length) for record in records
    ]
    assert sum(stage.steps for stage in stages) == 20
    read = sum(record.counts.get("b", 0) * record.seq_length for record in records) / 3000
    assert stages[-1].sources[0].epochs_so_far == pytest.approx(read, abs=0.01)


@pytest.mark.parametrize("taken", [3, 9, 12, 17])
def test_from_where_a_run_is(config, taken):
    whole = plan(TrainingData(config))
    data = TrainingData(config)
    state = data.state(take(data, taken))
    resumed = TrainingData(config)
    resumed.resume(json.loads(json.dumps(state)))
    rest = plan(resumed, iteration=taken)
    assert sum(stage.steps for stage in rest) == 20 - taken
    assert sum(stage.samples for stage in rest) == sum(stage.samples for stage in whole) - resumed.consumed
    assert rest[-1].sources[0].epochs_so_far == pytest.approx(whole[-1].sources[0].epochs_so_far, abs=0.01)


def test_warnings(config):
    data = TrainingData(config)
    texts = [str(problem) for problem in warnings(data, plan(data))]
    assert any("continues" in text and "beyond its 2,000" in text for text in texts)
    short = TrainingData(config.with_section("training", train_iters=4))
    assert any("stage two: is never reached" in str(problem) for problem in warnings(short, plan(short)))
    long = TrainingData(config.with_section("training", train_iters=90))
    assert any("would be read" in str(problem) for problem in warnings(long, plan(long)))


def test_tokens_and_epochs_by_hand(tmp_path):
    """20 steps of 4 samples of 16 tokens are 1,280: a quarter of 1,000 tokens is 0.32, three of 3,000 are 0.32 too."""
    for name, total in (("a", 1000), ("b", 3000)):
        write_source(tmp_path / name, total)
    blend = {
        "sources": {"a": {"path": "a"}, "b": {"path": "b"}},
        "stages": [{"name": "one", "weights": {"a": 0.25, "b": 0.75}}],
    }
    (stage,) = plan(TrainingData(run_config(tmp_path, blend, global_batch_size=4, train_iters=20)))
    assert (stage.steps, stage.samples, stage.tokens, stage.global_batch_size) == (20, 80, 1280, 4)
    assert {share.name: share.tokens for share in stage.sources} == {"a": 320, "b": 960}
    assert {share.name: share.epochs for share in stage.sources} == pytest.approx({"a": 0.32, "b": 0.32})
