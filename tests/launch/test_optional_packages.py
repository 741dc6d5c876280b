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
    "evaluation.tasks=[one]": "lm_eval",
    "precision.backend=te": "transformer_engine",
    "data.path=s3://bucket/data": "multistorageclient",
}


@pytest.fixture
def none_installed(monkeypatch):
    monkeypatch.setattr(module, "is_there", lambda name: name not in NEEDS.values())


@pytest.mark.parametrize("word", NEEDS)
def test_a_package_that_is_missing(word, none_installed):
    (found,) = findings(word)
    assert found.startswith(f"ERROR: {word.partition('=')[0]}: needs the package {NEEDS[word]}")
    assert "study" not in found
    assert "bucket" not in found, "a value may be a secret"
    assert "pip install 'megatron_qwen[" in found


@pytest.mark.parametrize(
    "word",
    [
        "precision.fp8=tensorwise",
        "precision.use_precision_aware_optimizer=true",
        "performance.fused_kernels=true",
        "performance.tp_comm_overlap=true",
        "performance.cuda_graph_impl=local",
        "performance.cpu_offloading_num_layers=1",
        "performance.optimizer_offload_fraction=0.5",
    ],
)
def test_what_only_transformer_engine_has_needs_it_under_the_automatic_backend(word, none_installed, monkeypatch):
    (found,) = findings("precision.dtype=bf16", word)
    assert found.startswith(f"ERROR: {word.partition('=')[0]}: needs the package transformer_engine")
    assert "pip install 'megatron_qwen[gpu]'" in found
    assert findings("precision.dtype=bf16", word, "precision.backend=torch") == [], "said by the checks of the fields"
    monkeypatch.setattr(module, "is_there", lambda _: True)
    assert findings("precision.dtype=bf16", word) == []


def test_fp8_that_is_kept_in_the_gather_needs_it_twice(none_installed):
    found = findings("precision.dtype=bf16", "precision.fp8=tensorwise", "performance.fp8_param_gather=true")
    assert [text.split(":")[1].strip() for text in found] == ["precision.fp8", "performance.fp8_param_gather"]


def test_emulated_fp8_needs_nothing(none_installed):
    assert findings("precision.fp8=tensorwise", "precision.emulate_fp8=true") == []


@pytest.mark.parametrize("value", ["deepep", "hybridep"])
def test_a_dispatcher_whose_package_is_missing(value, monkeypatch):
    monkeypatch.setattr(module, "is_there", lambda name: name != "deep_ep")
    (found,) = findings(f"performance.moe_token_dispatcher={value}")
    assert found.startswith(
        "ERROR: performance.moe_token_dispatcher: needs the package deep_ep, which is not installed"
    )
    assert findings("performance.moe_token_dispatcher=alltoall") == []


def test_all_at_once_and_in_preflight(none_installed):
    words = [word for word in NEEDS if not word.startswith("precision")]
    request = requests.make("tiny_dense", words, nodes=1, cluster="h100_infiniband", dry=True)
    texts = [str(item) for item in check(request, on_site=False).findings]
    assert sum("needs the package" in text for text in texts) == 4


def test_a_blend_whose_sources_lie_in_an_object_store(tmp_path, none_installed):
    blend = tmp_path / "blend.yaml"
    blend.write_text(
        "sources: {here: {path: here}, a: {path: 's3://bucket/a'}, b: {path: 'gs://bucket/b'}}\n"
        "stages: [{name: all, weights: {here: 1, a: 1, b: 1}}]\n"
    )
    (found,) = findings(f"data.blend={blend}")
    assert found.startswith("ERROR: data.blend: needs the package multistorageclient")
    assert "bucket" not in found
    blend.write_text("sources: {here: {path: here}}\nstages: [{name: all, weights: {here: 1}}]\n")
    assert findings(f"data.blend={blend}") == []
    blend.write_text("sources: [")
    assert findings(f"data.blend={blend}") == [], "said by the check of the blend"


def test_nothing_is_asked_of_a_configuration_that_needs_nothing(none_installed):
    assert findings() == []


def test_what_is_in_a_container_is_not_known(none_installed):
    assert findings(*NEEDS, container="pyxis", container_image="x.sqsh") == []


def test_a_package_inside_another_that_is_missing():
    assert not module.is_there("no_such_package.inside")
    assert module.is_there("json.decoder")
    assert "json" in sys.modules


def test_a_key_for_weights_and_biases(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "is_there", lambda _: True)
    word, home = "metrics.wandb_project=study", {"HOME": str(tmp_path)}
    (found,) = findings(word, environ=home, pass_environment=())
    assert found.startswith("warning: metrics.wandb_project: needs a key in the job")
    key = {**home, "WANDB_API_KEY": "x"}
    assert findings(word, environ=key, pass_environment=()), "the job does not get what is not passed on"
    assert findings(word, environ=key, pass_environment=("WANDB_API_KEY",)) == []
    assert findings(word, environ=home, environment={"WANDB_MODE": "offline"}) == []
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    assert findings(word, environ=home) == []


@pytest.mark.parametrize(
    ("passed", "shell", "lines", "warned"),
    [
        (("WANDB_MODE",), {}, {}, True),  # passed on, and not set
        (("WANDB_MODE",), {"WANDB_MODE": "offline"}, {}, False),
        (("WANDB_MODE",), {"WANDB_MODE": "online"}, {}, True),
        ((), {"WANDB_MODE": "offline"}, {}, True),  # set, and not passed on
        ((), {}, {"WANDB_MODE": "online"}, True),
        ((), {}, {"WANDB_MODE": "disabled"}, False),
        ((), {}, {"WANDB_MODE": "dryrun"}, False),
        (("WANDB_MODE",), {"WANDB_MODE": "offline"}, {"WANDB_MODE": "online"}, True),  # the file's line comes last
        (("WANDB_API_KEY",), {"WANDB_API_KEY": ""}, {}, True),
        ((), {}, {"WANDB_BASE_URL": "https://wandb.site.org:8080"}, True),
    ],
)
def test_a_key_is_needed_by_what_the_job_will_have(passed, shell, lines, warned, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "is_there", lambda _: True)
    environ = {"HOME": str(tmp_path), **shell}
    found = findings("metrics.wandb_project=study", environ=environ, pass_environment=passed, environment=lines)
    assert len(found) == warned


def test_a_key_of_the_server_that_the_job_writes_to(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "is_there", lambda _: True)
    (tmp_path / ".netrc").write_text("machine wandb.site.org\n  login user\n  password x\n")
    word, home = "metrics.wandb_project=study", {"HOME": str(tmp_path)}
    assert len(findings(word, environ=home)) == 1
    assert findings(word, environ=home, environment={"WANDB_BASE_URL": "https://wandb.site.org:8080"}) == []
