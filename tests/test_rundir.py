"""Which configurations a run directory belongs to."""

import pytest

from megatron_qwen.config.source import resolve
from megatron_qwen.errors import ConfigError
from megatron_qwen.files import temporary_name
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from tests.config import earlier


@pytest.fixture(params=["written now", "written by an earlier version"])
def directory(request, tmp_path):
    """A run with another RoPE base than the recipe's."""
    found = RunDirectory(tmp_path / "run")
    found.claim(resolve("demo", ["rope.base=5e5"], RECIPES))
    if request.param != "written now":
        earlier.rewrite(found.run_yaml)
    return found


def test_the_same_configuration_is_its_own(directory):
    for word in ("rope.base=5e5", "model.rotary_base=5e5"):
        assert directory.foreign_problems(resolve("demo", [word], RECIPES)) == []
    config = resolve("demo", ["rope.base=5e5", "training.train_iters=400"], RECIPES)
    directory.claim(config)
    assert resolve(str(directory.run_yaml), [], RECIPES) == config


def test_another_rope_base_is_another_run(directory):
    before = directory.run_yaml.read_text()
    for words in ([], ["model.rotary_base=1e6"]):
        with pytest.raises(ConfigError, match=r"rope\.base = 10+\.0: differs from 500000\.0"):
            directory.claim(resolve("demo", words, RECIPES))
    assert directory.run_yaml.read_text() == before


OWN = {
    "model.num_layers": 2,
    "optim.learning_rate": 0.5,
    "training.seed": 77,
    "data.path": "other/tokens",
    "data.validation_fraction": 0.5,
}
FREE = {"training.train_iters": 99, "training.global_batch_size": 12, "data.seq_length": 33, "checkpoint.keep_last": 7}


@pytest.mark.parametrize("field", OWN)
def test_what_defines_the_model_and_its_data_stays(field, tmp_path):
    found = RunDirectory(tmp_path / "run")
    found.claim(resolve("demo", [], RECIPES))
    before = found.run_yaml.read_text()
    with pytest.raises(ConfigError) as caught:
        found.claim(resolve("demo", [f"{field}={OWN[field]}"], RECIPES))
    assert [problem.where for problem in caught.value.problems] == [field]
    assert found.run_yaml.read_text() == before


@pytest.mark.parametrize("field", FREE)
def test_everything_else_may_change(field, tmp_path):
    found = RunDirectory(tmp_path / "run")
    found.claim(resolve("demo", [], RECIPES))
    changed = resolve("demo", [f"{field}={FREE[field]}"], RECIPES)
    found.claim(changed)
    assert resolve(str(found.run_yaml), [], RECIPES) == changed


def test_another_objective_is_another_run(tmp_path):
    found = RunDirectory(tmp_path / "run")
    config = resolve("demo", [], RECIPES)
    found.claim(config)
    (problem,) = found.foreign_problems(config.with_section("objective", kind="another"))
    assert (problem.where, problem.value) == ("objective.kind", "another")


def test_a_claim_that_was_killed_is_made_again(tmp_path):
    """Before run.yaml has its name there may be its temporary file, and the copy of the blend."""
    found = RunDirectory(tmp_path / "run")
    found.path.mkdir()
    temporary_name(found.run_yaml).write_text("model:")
    found.blend.write_text("stages: []")
    found.claim(resolve("demo", [], RECIPES))
    assert found.run_yaml.is_file()


def test_a_folder_with_other_files_is_refused(tmp_path):
    found = RunDirectory(tmp_path / "run")
    found.path.mkdir()
    (found.path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and has no run"):
        found.claim(resolve("demo", [], RECIPES))
    assert [path.name for path in found.path.iterdir()] == ["notes.txt"]


def test_a_newer_attempt_supersedes(tmp_path):
    """A directory that cannot be seen, as its file system is not mounted, says nothing of the kind."""
    run = RunDirectory(tmp_path / "run")
    assert not run.is_superseded(1), "it is not there"
    run.path.mkdir()
    first = run.begin_attempt(world_size=1)
    assert not run.is_superseded(first)
    run.begin_attempt(world_size=1)
    assert run.is_superseded(first)
