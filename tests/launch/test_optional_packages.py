"""What a configuration needs beside the project's own packages is missed before the job waits in the queue."""

import sys
from dataclasses import replace

import pytest

from launch import optional_packages as module
from launch import request as requests
from launch.preflight import check


def findings(*words: str, environ: dict[str, str] | None = None, **cluster) -> list[str]:
    request = requests.make("tiny_dense", list(words), nodes=1, cluster="h100_infiniband", dry=True)
    request = replace(request, cluster=replace(request.cluster, **cluster), environ=environ or {"HOME": "/nowhere"})
    return [str(item) for item in module.optional_packages(request)]


NEEDS = {
    "metrics.wandb_project=study": "wandb",
    "data.loader=dali": "nvidia.dali",
    "precision.backend=te": "transformer_engine",
    "data.path=s3://bucket/data": "multistorageclient",
}


@pytest.fixture
def none_installed(monkeypatch):
    monkeypatch.setattr(module, "_is_there", lambda name: name not in NEEDS.values())


@pytest.mark.parametrize("word", NEEDS)
def test_a_package_that_is_missing(word, none_installed):
    (found,) = findings(word)
    assert found.startswith(f"ERROR: {word.partition('=')[0]}: needs the package {NEEDS[word]}")
    assert "study" not in found
    assert "bucket" not in found, "a value may be a secret"
    assert "pip install 'megatron_qwen[" in found


def test_all_at_once_and_in_preflight(none_installed):
    words = [word for word in NEEDS if not word.startswith("precision")]
    request = requests.make("tiny_dense", words, nodes=1, cluster="h100_infiniband", dry=True)
    texts = [str(item) for item in check(request, on_site=False).findings]
    assert sum("needs the package" in text for text in texts) == 3


def test_nothing_is_asked_of_a_configuration_that_needs_nothing(none_installed):
    assert findings() == []


def test_what_is_in_a_container_is_not_known(none_installed):
    assert findings(*NEEDS, container="pyxis", container_image="x.sqsh") == []


def test_a_package_inside_another_that_is_missing():
    assert not module._is_there("no_such_package.inside")
    assert module._is_there("json.decoder")
    assert "json" in sys.modules


def test_a_key_for_weights_and_biases(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_is_there", lambda _: True)
    word, home = "metrics.wandb_project=study", {"HOME": str(tmp_path)}
    (found,) = findings(word, environ=home, pass_environment=())
    assert found.startswith("warning: metrics.wandb_project: needs a key in the job")
    key = {**home, "WANDB_API_KEY": "x"}
    assert findings(word, environ=key, pass_environment=()), "the job does not get what is not passed on"
    assert findings(word, environ=key, pass_environment=("WANDB_API_KEY",)) == []
    assert findings(word, environ=home, environment={"WANDB_MODE": "offline"}) == []
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    assert findings(word, environ=home) == []
