"""Fields that have moved mean the same at their earlier place, and cannot be given twice."""

import pytest

from megatron_qwen.config.moved import MOVED, with_moved_fields
from megatron_qwen.config.render import to_yaml
from megatron_qwen.config.run import all_fields
from megatron_qwen.config.source import resolve
from megatron_qwen.errors import ConfigError
from megatron_qwen.recipes.registry import RECIPES
from tests.config import earlier


def test_the_table_leads_from_unknown_fields_to_known_ones():
    known = all_fields()
    assert all(new in known and old not in known for old, new in MOVED.items())


@pytest.mark.parametrize("name", ["tiny_moe", "demo", "qwen2_5_turbo_standin", "qwen3_8b"])
def test_an_earlier_run_yaml(name, tmp_path):
    """Bases of 1e6 (the default), 1e4 and 1e7."""
    config, path = RECIPES[name](), tmp_path / "run.yaml"
    path.write_text(to_yaml(config))
    earlier.rewrite(path)
    assert "rope:" not in path.read_text()
    assert resolve(str(path), [], RECIPES) == config
    assert resolve(str(path), ["rope.base=5e5"], RECIPES).rope.base == 5e5
    assert resolve(str(path), ["model.rotary_base=5e5"], RECIPES).rope.base == 5e5


def test_an_earlier_run_yaml_without_a_recipe(tmp_path):
    config, path = RECIPES["demo"](), tmp_path / "run.yaml"
    path.write_text(to_yaml(config).replace("recipe: demo", "recipe: custom"))
    earlier.rewrite(path)
    found = resolve(str(path), [], RECIPES)
    assert (found.recipe, found.model, found.rope) == ("custom", config.model, config.rope)


def test_an_earlier_override():
    wanted = resolve("demo", ["rope.base=5e5"], RECIPES)
    assert wanted.rope.base == 5e5
    for words in (["model.rotary_base=5e5"], ["--model.rotary_base", "500000"], ["--model.rotary_base=5e5"]):
        assert resolve("demo", words, RECIPES) == wanted


def test_both_places_with_one_value():
    assert resolve("demo", ["model.rotary_base=1e6", "rope.base=1000000"], RECIPES).rope.base == 1e6


@pytest.mark.parametrize(
    "words", [["model.rotary_base=1e5", "rope.base=1e6"], ["rope.base=1e6", "model.rotary_base=1e5"]]
)
def test_both_places_with_different_values(words, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("recipe: demo\nmodel: {rotary_base: 1e5}\nrope: {base: 1e6}\n")
    for source, overrides in (("demo", words), (str(path), [])):
        with pytest.raises(ConfigError) as caught:
            resolve(source, overrides, RECIPES)
        (problem,) = caught.value.problems
        said = "model.rotary_base = 100000.0: has moved to rope.base, which is given too, as 1000000.0; give rope.base"
        assert str(problem).startswith(said)


@pytest.mark.parametrize(
    "word", ["model.rotary_bas=1e6", "model.rotarybase=1e6", "rotary_base=1e6", "rope.rotary_base=1"]
)
def test_misspelt(word):
    with pytest.raises(ConfigError, match=r"Did you mean rope\.base\?") as caught:
        resolve("demo", [word], RECIPES)
    assert len(caught.value.problems) == 1


def test_a_wrong_value_is_reported_where_it_was_given():
    with pytest.raises(ConfigError, match=r"model\.rotary_base = 'large': must be float"):
        resolve("demo", ["model.rotary_base=large"], RECIPES)


def test_sections_that_a_program_wrote():
    earlier_ones = {"model": {"num_layers": 2, "rotary_base": 1e4}, "recipe": "demo"}
    found = with_moved_fields(earlier_ones)
    assert found == {"model": {"num_layers": 2}, "recipe": "demo", "rope": {"base": 1e4}}
    assert with_moved_fields(found) == found
    assert earlier_ones["model"]["rotary_base"] == 1e4
    both = {"model": {"rotary_base": 1e4}, "rope": {"base": 1e6}}
    assert with_moved_fields(both) == {"model": {}, "rope": {"base": 1e6}}
    assert with_moved_fields({"model": [1], "rope": 5}) == {"model": [1], "rope": 5}
