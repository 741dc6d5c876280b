"""Checkpoints as Megatron-LM and Megatron-Bridge write them: by megatron-core's own save, arguments beside."""

import argparse
import json
import queue
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_convert.convert import main
from megatron_qwen.checkpoint.common_state import read_common_state
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.source import resolve
from megatron_qwen.errors import CheckpointError, ConfigError, UserError
from megatron_qwen.recipes.registry import RECIPES
from tests.distributed import jobs


def arguments(config: RunConfig, **changes: Any) -> argparse.Namespace:
    """What Megatron-LM's command line would hold, enumerations and formats among it."""
    import signal

    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    model = config.model
    values = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.head_dim,
        "norm_epsilon": model.layernorm_epsilon,
        "rotary_base": int(config.rope.base),
        "add_qkv_bias": model.add_qkv_bias,
        "qk_layernorm": model.qk_layernorm,
        "untie_embeddings_and_output_weights": not model.share_embeddings_and_output_weights,
        "normalization": "RMSNorm",
        "swiglu": True,
        "position_embedding_type": "rope",
        "add_bias_linear": False,
        "num_experts": model.num_moe_experts,
        "moe_router_topk": model.moe_router_topk,
        "tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.parallel.pipeline_model_parallel_size,
        "consumed_train_samples": 640,
        "seq_length": 64,
        "params_dtype": torch.float32,
        "attention_backend": AttnBackend.auto,
        "model_type": ModelType.encoder_or_decoder,
        "exit_signal": signal.SIGTERM,
        "data_path": ["/data/a", "/data/b"],
    }
    return argparse.Namespace(**(values | changes))


def save_as_megatron_lm(config: RunConfig, out: Path, metadata: dict[str, Any], changes: dict[str, Any]) -> None:
    """Saves the initial model with megatron-core's function and nothing of ours."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_qwen.training.build import build_components

    components = build_components(config)
    (module,) = components.model.modules
    if dist.get_rank() == 0:
        out.mkdir(parents=True)
    dist.barrier()
    state = {
        "args": arguments(config, **changes),
        "checkpoint_version": 3.0,
        "iteration": 10,
        "model": module.sharded_state_dict(metadata={**metadata, "dp_cp_group": components.groups.dp_cp}),
        "opt_param_scheduler": {"max_lr": 1e-4, "num_steps": 640},
    }
    # In this process: a rank of the pool may have no children.
    filesystem_async._results_queue = queue.Queue()
    request = dist_checkpointing.save(
        state, str(out), validate_access_integrity=False, async_sharded_save=True, async_strategy="mcore"
    )
    request.execute_sync()


@pytest.fixture
def config(tokens):
    def of(recipe: str, *fields: str) -> RunConfig:
        return resolve(recipe, [f"data.path={tokens}", "model.init_method_std=0.2", *fields], RECIPES)

    return of


TP2 = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
PP2 = ("parallel.pipeline_model_parallel_size=2",)
EP2 = ("parallel.expert_model_parallel_size=2",)
PER_LAYER = {"non_homogeneous_layers": True}
FORMS: dict[str, tuple[str, tuple[str, ...], int, dict[str, Any]]] = {
    "one tensor for all layers": ("tiny_dense", TP2, 2, {}),
    "a tensor a layer": ("tiny_dense", TP2, 2, {"non_homogeneous_layers": True}),
    "gate and up apart": ("tiny_dense", TP2 + PP2, 4, {"singleton_local_shards": True}),
    "Qwen3": ("tiny_qwen3", PP2, 2, {}),
    "experts": ("tiny_moe", EP2, 2, {}),
    "a tensor a layer and expert": ("tiny_moe", EP2, 2, PER_LAYER | {"singleton_local_shards": True}),
}


@pytest.mark.parametrize("form", FORMS)
def test_converts(form, config, pool, tokenizer, tmp_path):
    recipe, fields, ranks, metadata = FORMS[form]
    foreign = tmp_path / "iter_0000010"
    pool[ranks].run(save_as_megatron_lm, config(recipe, *fields), foreign, metadata, {})
    assert not list(foreign.glob("*.yaml"))
    # The same seed gives the same model under any layout, so one rank of ours is the reference.
    own = tmp_path / "own"
    pool[1].run(jobs.train, config(recipe), 0, own)
    words = ["--config", recipe, "model.init_method_std=0.2", "--tokenizer", str(tokenizer)]
    assert main(["to-hf", str(tmp_path), str(tmp_path / "hf"), *words]) == 0
    assert main(["to-hf", str(own), str(tmp_path / "reference")]) == 0
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "reference"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| Tokens seen | 40,960 |" in card
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    assert not json.loads((tmp_path / "hf" / "manifest.json").read_text())["source"]["verified"]


def test_says_what_is_missing_and_what_contradicts(config, pool, tmp_path):
    foreign = tmp_path / "iter_0000010"
    changes = {"rotary_base": 10_000, "norm_epsilon": 1e-5, "apply_layernorm_1p": True}
    pool[1].run(save_as_megatron_lm, config("tiny_dense"), foreign, {}, changes)
    with pytest.raises(ConfigError, match="--config"):
        main(["to-hf", str(foreign), str(tmp_path / "hf")])
    with pytest.raises(CheckpointError) as caught:
        main(["to-hf", str(foreign), str(tmp_path / "hf"), "--config", "tiny_dense"])
    message = caught.value.render()
    for word in ("rotary_base = 10000", "rope.base=...", "norm_epsilon = 1e-05", "apply_layernorm_1p=True"):
        assert word in message, message
    with pytest.raises(CheckpointError, match="written with hidden_size = 64"):
        main(["to-hf", str(foreign), str(tmp_path / "hf"), "--config", "qwen2_5_0_5b"])
    assert not (tmp_path / "hf").exists()


def test_common_pt_of_older_versions(config, tmp_path):
    noted = {"args": arguments(config("tiny_dense")), "iteration": 7, "tensor": torch.ones(2), "size": torch.Size([3])}
    torch.save(noted, tmp_path / "common.pt")
    content = read_common_state(tmp_path)
    assert content["iteration"] == 7
    assert content["args"].num_layers == 4
    assert content["args"].data_path == ["/data/a", "/data/b"]
    torch.save({"args": argparse.Namespace(hook=json.loads)}, tmp_path / "common.pt")
    with pytest.raises(UserError, match=r"json\.loads"):
        read_common_state(tmp_path)


def test_inspect_reads_it(config, pool, tmp_path, capsys):
    foreign = tmp_path / "iter_0000010"
    fields = (*TP2, *PP2)
    pool[4].run(save_as_megatron_lm, config("tiny_dense", *fields), foreign, {}, {})
    assert main(["inspect", str(foreign), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["iteration"], found["layout"], found["tokens"]) == (10, "TP2 PP2", 40_960)
    assert sum(part["values"] for part in found["parts"]) == 189_504 + 2 * 64 * (512 - 320)  # padded for TP 2
