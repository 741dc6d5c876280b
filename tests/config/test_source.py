"""Recipes, run.yaml and overrides become one configuration; what is written reads back the same."""

import pytest

from megatron_qwen.config.checks import problems
from megatron_qwen.config.render import difference, to_yaml
from megatron_qwen.config.run import all_fields
from megatron_qwen.config.source import resolve
from megatron_qwen.errors import ConfigError
from megatron_qwen.recipes.registry import RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_reads_back_from_yaml(name, tmp_path):
    config = RECIPES[name]()
    assert config.recipe == name
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert resolve(str(tmp_path / "run.yaml"), [], RECIPES) == config


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_legal_on_its_own_ranks(name):
    config = RECIPES[name]()
    parallel = config.parallel
    experts = parallel.expert_model_parallel_size * parallel.expert_tensor_size * parallel.pipeline_model_parallel_size
    ranks = max(parallel.model_parallel_size, experts)
    assert problems(config, world_size=ranks) == []


def test_both_forms_of_an_override():
    a = resolve("tiny_dense", ["optim.learning_rate=1e-4", "training.rampup_batch_size=[2, 2, 8]"], RECIPES)
    b = resolve("tiny_dense", ["--optim.learning_rate", "1e-4", "--training.rampup_batch_size=[2,2,8]"], RECIPES)
    assert a == b
    assert a.optim.learning_rate == 1e-4
    assert a.training.rampup_batch_size == (2, 2, 8)


def test_numbers_words_and_null():
    config = resolve(
        "tiny_dense",
        ["optim.clip_grad=1", "data.path=2024", "metrics.profile_start=null", "checkpoint.strict=true"],
        RECIPES,
    )
    assert (config.optim.clip_grad, config.data.path, config.metrics.profile_start) == (1.0, "2024", None)
    assert config.checkpoint.strict is True


def test_a_file_may_name_a_recipe_or_give_every_shape(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("recipe: tiny_dense\ntraining:\n  train_iters: 3\n")
    config = resolve(str(path), ["training.train_iters=4"], RECIPES)
    assert difference(config, RECIPES["tiny_dense"]()) == {"training": {"train_iters": 4}}
    shape = {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 2,
    }
    lines = [
        f"  {name}: {value}" for name, value in {**shape, "vocab_size": 300, "max_position_embeddings": 64}.items()
    ]
    path.write_text("model:\n" + "\n".join(lines) + "\n")
    assert resolve(str(path), [], RECIPES).model.num_layers == 2


def test_every_field_is_documented_and_settable():
    for path, info in all_fields().items():
        assert info.doc.endswith((".", "]")), path
        assert len(info.doc) > 10, path
    with pytest.raises(ConfigError, match="expected section"):
        resolve("tiny_dense", ["model.=1"], RECIPES)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0123", "0123"), ("1_000", "1_000"), ("corpus #1", "corpus #1"), ("null", None), ("true", "true")],
)
def test_text_is_taken_as_typed(text, value):
    assert resolve("tiny_dense", [f"data.path={text}"], RECIPES).data.path == value


def test_yaml_1_2_numbers(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("recipe: tiny_dense\noptim:\n  learning_rate: 1e-4\ntraining:\n  train_iters: 010\n")
    config = resolve(str(path), [], RECIPES)
    assert (config.optim.learning_rate, config.training.train_iters) == (1e-4, 10)
