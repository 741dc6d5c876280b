"""What a submission reads, and what keeps two of them apart."""

import pytest

from launch.submit import ArrayFile, alone, read_array
from megatron_qwen.errors import ConfigError


def test_an_array_file(tmp_path):
    path = tmp_path / "array.yaml"
    path.write_text("recipe: tiny_dense\noverrides: [data.path=tokens]\nruns:\n  a: [optim.learning_rate=1e-4]\n  2:\n")
    assert read_array(path) == ArrayFile(
        recipe="tiny_dense", overrides=("data.path=tokens",), runs={"a": ("optim.learning_rate=1e-4",), "2": None}
    )


def test_everything_wrong_with_one(tmp_path):
    path = tmp_path / "array.yaml"
    path.write_text("recipes: tiny_dense\noverrides: data.path=tokens\nruns: {a: [5]}\n")
    with pytest.raises(ConfigError) as caught:
        read_array(path)
    assert [str(problem).removeprefix(f"{path}: ") for problem in caught.value.problems] == [
        "recipes: no such field. Did you mean recipe?",
        "recipe: is required.",
        "overrides = 'data.path=tokens': must be list of section.field=value.",
        "runs.a[0] = 5: must be section.field=value.",
    ]
    path.write_text("recipe: tiny_dense\nruns: {}\n")
    with pytest.raises(ConfigError, match="runs: must map names"):
        read_array(path)


def test_two_submissions_of_a_run(tmp_path):
    with alone(tmp_path / "run"):
        with pytest.raises(ConfigError, match="is being submitted by another command"), alone(tmp_path / "run"):
            pass
        with alone(tmp_path / "other"):
            pass
    with alone(tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir())
