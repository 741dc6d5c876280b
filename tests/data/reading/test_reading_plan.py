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


def packed_run(folder, document: int, steps: int, *, seq_length: int):
    write_source(folder / "a", 100 * document, document=document)
    blend = {"sources": {"a": {"path": "a", "packing": "best_fit"}}, "stages": [{"name": "one", "weights": {"a": 1}}]}
    return TrainingData(run_config(folder, blend, seq_length=seq_length, global_batch_size=10, train_iters=steps))


@pytest.mark.parametrize(
    ("document", "seq_length", "rows"),
    [
        (30, 40, 100),  # one document in a row of 40: a quarter is padding
        (13, 40, 34),  # three in a row, and the hundredth alone
        (30, 16, 200),  # cut into pieces of 16, which fill a row, and of 14, which have one each
    ],
)
def test_epochs_of_packed_rows_leave_padding_out(document, seq_length, rows, tmp_path):
    """Of 100 documents; an epoch is as many rows as they fill."""
    (stage,) = plan(packed_run(tmp_path, document, 2 * rows, seq_length=seq_length))
    (share,) = stage.sources
    assert share.epochs == pytest.approx(20, rel=0.01)  # ten samples a step
    assert share.tokens == stage.tokens == 20 * rows * seq_length, "positions, as the budget of a stage counts them"


def test_max_epochs_is_compared_with_tokens_and_not_with_padding(tmp_path):
    """38 steps of 10 rows of one document are 3.8 epochs, and 4.2 epochs' worth of positions at 33 for 30 tokens."""
    data = packed_run(tmp_path, 30, 38, seq_length=33)
    assert warnings(data, plan(data)) == []
    data = packed_run(tmp_path, 30, 42, seq_length=33)
    (told,) = warnings(data, plan(data))
    assert "would be read 4.2 times; max_epochs is 4" in told.fix


def test_epochs_read_before_a_resume_leave_padding_out_too(tmp_path):
    whole = plan(packed_run(tmp_path, 30, 40, seq_length=40))
    data = packed_run(tmp_path, 30, 40, seq_length=40)
    state = data.state(take(data, 15))
    resumed = packed_run(tmp_path, 30, 40, seq_length=40)
    resumed.resume(json.loads(json.dumps(state)))
    (stage,) = plan(resumed, iteration=15)
    assert stage.sources[0].epochs == pytest.approx(2.5)
    assert stage.sources[0].epochs_so_far == whole[0].sources[0].epochs_so_far == pytest.approx(4.0)
