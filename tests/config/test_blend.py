"""Blend files: what they say, and everything that is wrong with one, at once."""

import pytest
import yaml

from megatron_qwen.config.blend import amount, read_blend, single_source
from megatron_qwen.errors import ConfigError
from megatron_qwen.recipes.registry import RECIPES

GOOD = {
    "sources": {"web": {"path": "data/web"}, "code": {"path": "/abs/code", "packing": "best_fit", "fim_rate": 0.5}},
    "stages": [
        {"name": "short", "tokens": "1.5M", "seq_length": 64, "weights": {"web": 3, "code": 1}},
        {"name": "long", "budgets": {"web": "60K", "code": 40_000}, "seq_length": 256, "lengths": {256: 2, 64: 3}},
    ],
}


def write(tmp_path, content):
    path = tmp_path / "blend.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_what_a_file_says(tmp_path):
    blend = read_blend(write(tmp_path, GOOD))
    assert blend.sources["web"].path == str(tmp_path / "data/web")
    assert blend.sources["code"].path == "/abs/code"
    short, long = blend.stages
    assert (short.tokens, short.weights) == (1_500_000, {"web": 0.75, "code": 0.25})
    assert (long.tokens, long.weights) == (100_000, {"web": 0.6, "code": 0.4})
    assert long.lengths == {256: 0.4, 64: 0.6}


def test_a_copy_says_the_same(tmp_path):
    blend = read_blend(write(tmp_path, GOOD))
    assert read_blend(write(tmp_path, blend.as_dict())) == blend
    assert read_blend(write(tmp_path, single_source("/a/b").as_dict())) == single_source("/a/b")


def test_what_a_stage_changes(tmp_path):
    content = {**GOOD, "stages": [{**GOOD["stages"][0], "rotary_base": 5e5, "global_batch_size": 6}]}
    config = RECIPES["tiny_dense"]().with_section("training", rampup_batch_size=(2, 2, 100))
    stage = read_blend(write(tmp_path, content)).stages[0].configure(config)
    assert (stage.data.seq_length, stage.rope.base, stage.training.global_batch_size) == (64, 5e5, 6)
    assert stage.training.rampup_batch_size is None
    assert stage.optim == config.optim


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sources": None}, ["sources", "must name at least one source"]),
        ({"stages": []}, ["must be a list of at least one stage"]),
        ({"stage": []}, ["stage: no such field. Did you mean stages?"]),
        ({"sources": {"web": {"paht": "x"}, "code": {"path": "y"}}}, ["paht: no such field. Did you mean path?"]),
        ({"sources": {"a b": {"path": "x"}}}, ["must be letters", "no such source"]),
        (
            {"sources": {**GOOD["sources"], "web": {"path": "x", "fim_rate": 2}}},
            ["sources.web.fim_rate = 2.0: must be at most 1."],
        ),
        ({"sources": {**GOOD["sources"], "web": {"path": "x", "packing": "tight"}}}, ["one of windows, best_fit"]),
        ({"stages": [{"name": "s", "weights": {"wbe": 1}}]}, ["no such source. Did you mean web?"]),
        ({"stages": [{"name": "s", "weights": {"web": 0}}]}, ["must be a number above 0"]),
        ({"stages": [{"name": "s"}]}, ["must set either weights", "or budgets"]),
        ({"stages": [{"name": "s", "weights": {"web": 1}, "budgets": {"web": 1}}]}, ["either weights"]),
        ({"stages": [{"weights": {"web": 1}}]}, ["name", "is required"]),
        ({"stages": [{"name": "s", "weights": {"web": 1}}] * 2}, ["two stages have this name", "except the last"]),
        ({"stages": [{"name": "s", "budgets": {"web": "1K"}, "tokens": "2K"}]}, ["must equal the sum of the budgets"]),
        ({"stages": [{"name": "s", "weights": {"web": 1}, "tokens": "many"}]}, ["such as 300B"]),
        ({"stages": [{"name": "s", "weights": {"web": 1}, "seq_length": 64, "lengths": {48: 1}}]}, ["must divide"]),
        (
            {"stages": [{"name": "s", "weights": {"web": 1}, "lengths": {64: 1}}]},
            ["requires seq_length in the same stage"],
        ),
        (
            {"stages": [{"name": "s", "weights": {"web": 1}, "seq_length": "long"}]},
            ["stages[0].seq_length = 'long': must be int."],
        ),
        ({"stages": ["s"]}, ["must be a mapping"]),
    ],
)
def test_what_is_wrong(change, named, tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_blend(write(tmp_path, {**GOOD, **change}))
    for text in named:
        assert text in str(caught.value), str(caught.value)


def test_everything_at_once(tmp_path):
    content = {
        "sources": {"web": {"path": 5.5, "fim_rate": "x"}},
        "stages": [{"name": "s", "weights": {"web": 1, "no": 1}, "seq_length": 1, "wieghts": {}}],
    }
    with pytest.raises(ConfigError) as caught:
        read_blend(write(tmp_path, content))
    assert len(caught.value.problems) >= 4


@pytest.mark.parametrize(
    ("value", "number"),
    [(5, 5), ("300B", 3e11), ("1.5k", 1500), ("17 T", 1.7e13), ("x", None), (True, None), ("5", None), (None, None)],
)
def test_amounts(value, number):
    assert amount(value) == number
