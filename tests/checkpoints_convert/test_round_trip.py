"""Hugging Face to Megatron, through checkpoints of other layouts, and back: every byte of the weights is the same."""

import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from checkpoints_convert.checkpoint_source import open_checkpoint
from checkpoints_convert.from_hf import ImportOptions, convert
from checkpoints_convert.to_hf import ExportOptions, export
from megatron_qwen.config.checks import require_legal
from megatron_qwen.config.source import resolve
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from tests.checkpoints_convert.models import make, with_tokenizer
from tests.distributed import jobs
from tests.tiers import cases

TP, PP, VPP, EP = (
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.virtual_pipeline_model_parallel_size",
    "parallel.expert_model_parallel_size",
)
SP = {"parallel.sequence_parallel": True}
UNEVEN = {PP: 2, "parallel.num_layers_in_first_pipeline_stage": 1}
ETP1 = {"parallel.expert_tensor_parallel_size": 1}
# name of the model, ranks and layout that it passes through
LAYOUTS: list[tuple[str, int, dict[str, Any]]] = cases(
    [
        ("qwen2 odd tied", 1, {}),
        ("qwen3 odd", 1, {}),
        ("qwen2_moe odd", 1, {}),
        ("qwen3_moe odd", 1, {}),
        ("qwen2 odd", 2, UNEVEN),
        ("qwen2 even", 2, {PP: 2, VPP: 4}),
        ("qwen2 even", 4, {TP: 2, PP: 2, VPP: 2} | SP),
        ("qwen2 even tied", 4, {TP: 2, PP: 2}),
        ("qwen3 even tied", 4, {TP: 4}),
        ("qwen2_moe odd", 4, UNEVEN | {EP: 2}),
        ("qwen2_moe even", 4, {TP: 2, EP: 2} | SP | ETP1),
        ("qwen3_moe even", 4, {PP: 4, VPP: 2}),
    ],
    [
        *((name, 1, {}) for name in ("qwen2 odd", "qwen2 even", "qwen2 even tied", "qwen3 even tied")),
        *((name, 1, {}) for name in ("qwen2_moe even", "qwen3_moe even")),
        ("qwen2 odd tied", 2, UNEVEN),
        ("qwen3 odd", 2, UNEVEN),
        ("qwen2 even", 2, {TP: 2}),
        ("qwen2 even", 4, {TP: 4} | SP),
        ("qwen2 even", 4, {PP: 4}),
        ("qwen2 even", 4, {PP: 4, VPP: 2}),
        ("qwen2 even tied", 4, {TP: 4}),
        ("qwen3 even tied", 4, {TP: 2, PP: 2, VPP: 4} | SP),
        ("qwen2_moe odd", 2, {EP: 2}),
        ("qwen2_moe odd", 4, {EP: 4}),
        ("qwen2_moe even", 4, {TP: 4} | SP),
        ("qwen2_moe even", 4, {PP: 2, VPP: 2, EP: 2}),
        ("qwen3_moe odd", 4, {EP: 4}),
        ("qwen3_moe even", 4, {TP: 2, PP: 2} | SP),
    ],
)


def weight_files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("model"))


def assert_same_weights(back: Path, original: Path) -> None:
    assert weight_files(back) == weight_files(original)
    match, mismatch, errors = filecmp.cmpfiles(original, back, weight_files(original), shallow=False)
    assert not mismatch
    assert not errors
    assert match


@pytest.mark.parametrize(
    ("name", "ranks", "layout"),
    LAYOUTS,
    ids=[f"{name} {ranks} {number}" for number, (name, ranks, _) in enumerate(LAYOUTS)],
)
def test_every_byte_comes_back(name, ranks, layout, pool, tokens, tmp_path):
    original = make(name, tmp_path / "hf")
    convert(original, tmp_path / "start", ImportOptions(quiet=True))
    fields = [f"data.path={tokens}", "data.seq_length=64", "training.global_batch_size=4"]
    fields += [f"{field}={value}" for field, value in layout.items()]
    config = resolve(str(tmp_path / "start" / "run.yaml"), fields, RECIPES)
    require_legal(config, world_size=ranks)
    run_dir = tmp_path / "run"
    RunDirectory(run_dir).claim(config)
    answers = pool[ranks].run(jobs.start_from, config, run_dir)
    assert all(torch.isfinite(torch.tensor(answer["loss"])) for answer in answers)
    # What the layout wrote, not what was converted.
    assert jobs.tensor_hashes(tmp_path / "run" / "checkpoints" / "iter_0000000")
    export(open_checkpoint(run_dir), tmp_path / "back", ExportOptions(quiet=True))
    assert_same_weights(tmp_path / "back", original)


@pytest.mark.parametrize("name", ["qwen2 even tied", "qwen3 odd", "qwen2_moe odd", "qwen3_moe even"])
def test_files_of_a_sharded_directory_come_back(name, tokenizer, tmp_path):
    original = with_tokenizer(make(name, tmp_path / "hf", max_shard_size="60KB"), tokenizer)
    generation = {"bos_token_id": 3, "eos_token_id": [5, 3], "temperature": 0.7}
    (original / "generation_config.json").write_text(json.dumps(generation))
    convert(original, tmp_path / "start", ImportOptions(quiet=True, max_shard_bytes=150_000))
    export(open_checkpoint(tmp_path / "start"), tmp_path / "back", ExportOptions(quiet=True))
    assert len(weight_files(original)) > 4
    assert len(list((tmp_path / "start/checkpoints/iter_0000000").glob("*.distcp"))) > 2
    assert_same_weights(tmp_path / "back", original)
    for path in [*tokenizer.iterdir(), original / "generation_config.json"]:
        assert (tmp_path / "back" / path.name).read_bytes() == (original / path.name).read_bytes()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == ([5, 3], 3)
    # The same computation, by transformers' own reading of both configurations.
    ids = torch.arange(40)[None] % 320
    logits = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
        for path in (original, tmp_path / "back")
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp16"])
def test_formats(dtype, tmp_path):
    original = make("qwen2 odd", tmp_path / "hf", dtype=torch.float32)
    convert(original, tmp_path / "start", ImportOptions(quiet=True, dtype=dtype))
    export(open_checkpoint(tmp_path / "start"), tmp_path / "back", ExportOptions(quiet=True))
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[dtype]
    if dtype == "fp32":
        assert_same_weights(tmp_path / "back", original)
    first, second = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (tmp_path / "back", original))
    assert next(first.parameters()).dtype == torch_dtype
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other.to(torch_dtype))


@pytest.mark.parametrize(("stored", "computed"), [("bf16", "fp32"), ("fp16", "bf16"), ("fp32", "bf16")])
def test_training_goes_on_in_another_format(stored, computed, pool, tokens, tmp_path):
    original = make("qwen3 odd", tmp_path / "hf", dtype=torch.float32)
    convert(original, tmp_path / "start", ImportOptions(quiet=True, dtype=stored))
    fields = [
        f"data.path={tokens}",
        "data.seq_length=64",
        "training.global_batch_size=4",
        f"precision.dtype={computed}",
    ]
    config = resolve(str(tmp_path / "start" / "run.yaml"), fields, RECIPES)
    run_dir = tmp_path / "run"
    RunDirectory(run_dir).claim(config)
    assert pool[1].run(jobs.start_from, config, run_dir)[0]["loss"] > 0
    export(open_checkpoint(tmp_path / "start"), tmp_path / "expected", ExportOptions(quiet=True, dtype=computed))
    export(open_checkpoint(run_dir), tmp_path / "back", ExportOptions(quiet=True))
    assert_same_weights(tmp_path / "back", tmp_path / "expected")


def test_a_checkpoint_of_another_shape_is_refused_by_name(pool, tokens, tmp_path):
    convert(make("qwen3 odd", tmp_path / "hf"), tmp_path / "start", ImportOptions(quiet=True))
    fields = [f"data.path={tokens}", f"checkpoint.load={tmp_path / 'start'}", "training.train_iters=1"]
    config = resolve("tiny_dense", fields, RECIPES)
    (message,) = pool[1].run(refusal_of_start, config, tmp_path / "run")
    assert "decoder.layers.self_attention.linear_qkv.weight" in message
    assert "but the configuration requires" in message


def refusal_of_start(config: Any, run_dir: Path) -> str:
    """Starts from ``checkpoint.load``; answers with the error."""
    from megatron_qwen.errors import CheckpointError

    try:
        jobs.start_from(config, run_dir)
    except CheckpointError as error:
        return error.render()
    return "loaded"


def test_an_index_over_a_single_file_comes_back(tmp_path):
    original = make("qwen2 odd", tmp_path / "hf")
    (original / "model.safetensors").rename(original / "model-00001-of-00001.safetensors")
    names = load_file(original / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (original / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(original, tmp_path / "start", ImportOptions(quiet=True))
    export(open_checkpoint(tmp_path / "start"), tmp_path / "back", ExportOptions(quiet=True))
    assert weight_files(tmp_path / "back") == weight_files(original)
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def test_a_tokenizer_of_two_files(tmp_path):
    """vocab.json and merges.txt alone: kept as they are, token ids from config.json."""
    original = make("qwen2 odd", tmp_path / "hf")
    for name in ("vocab.json", "merges.txt"):
        (original / name).write_text("{}")
    (original / "generation_config.json").unlink()
    content = json.loads((original / "config.json").read_text()) | {"eos_token_id": 7, "bos_token_id": 6}
    (original / "config.json").write_text(json.dumps(content))
    convert(original, tmp_path / "start", ImportOptions(quiet=True))
    export(open_checkpoint(tmp_path / "start"), tmp_path / "back", ExportOptions(quiet=True))
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (7, 6)
    assert (tmp_path / "back" / "merges.txt").read_text() == "{}"
