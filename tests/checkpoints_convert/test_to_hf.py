"""The exported directory is the trained model: transformers computes the same numbers from it."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import xxhash
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints_convert.checkpoint_source import open_checkpoint
from checkpoints_convert.to_hf import ExportOptions, export
from megatron_qwen.checkpoint.paths import iteration_dir
from megatron_qwen.config.source import resolve
from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer
from megatron_qwen.estimate.parameters import count_parameters
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from tests.conftest import make_run, run
from tests.distributed import jobs

VARIANTS = {
    "dense": ("tiny_dense", []),
    "dense tied": ("tiny_dense", ["model.share_embeddings_and_output_weights=true"]),
    "dense, wide heads": ("tiny_dense", ["model.kv_channels=32"]),
    "MoE": ("tiny_moe", []),
    "MoE renormalised": ("tiny_moe", ["model.moe_router_pre_softmax=false"]),
    "Qwen3": ("tiny_qwen3", []),
    "Qwen3 MoE": ("tiny_qwen3_moe", []),
}


def export_run(run_dir: Path, out: Path, **options: Any) -> None:
    export(open_checkpoint(run_dir), out, ExportOptions(quiet=True, **options))


def core_logits(checkpoint: Path, tokens: torch.Tensor) -> Any:
    """[b, s] -> [b, s, vocabulary] by megatron-core, on the calling rank."""
    from checkpoints_convert.compare.whole_models import checkpoint_logits, load_checkpoint

    config, model, _ = load_checkpoint(checkpoint)
    return checkpoint_logits(model, tokens, vocab_size=config.model.vocab_size).numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_computes_the_same(variant, pool, tokens, tokenizer, tmp_path):
    recipe, changes = VARIANTS[variant]
    # Large initial weights and rates make logits that differ, so that agreement says something.
    loud = ["model.init_method_std=0.2", "optim.learning_rate=1e-2", "training.train_iters=4"]
    config = resolve(recipe, [f"data.path={tokens}", f"data.tokenizer={tokenizer}", *loud, *changes], RECIPES)
    run_dir = tmp_path / "run"
    RunDirectory(run_dir).claim(config)
    assert pool[1].run(jobs.attempt, config, run_dir) == [0]
    export_run(run_dir, tmp_path / "hf")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    family = "Qwen3" if config.model.qk_layernorm else "Qwen2"
    assert type(model).__name__ == f"{family}{'Moe' if config.model.is_moe else ''}ForCausalLM"
    assert sum(value.numel() for value in model.parameters()) == count_parameters(config.model).total

    data = TrainingData(config)
    source = data.validation(data.at(0))
    samples = [source[index] for index in range(8)]
    inputs = torch.stack([torch.from_numpy(sample.tokens) for sample in samples])
    labels = torch.stack([torch.from_numpy(sample.labels) for sample in samples])
    ours = torch.from_numpy(pool[1].run(core_logits, run_dir, inputs)[0])
    with torch.no_grad():
        theirs = model(input_ids=inputs).logits
    difference = float((ours - theirs).abs().max())
    losses = [
        float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())) for logits in (ours, theirs)
    ]
    print(
        f"{variant}: logits {difference:.1e}, spread {float(theirs.std()):.2f}, loss {abs(losses[0] - losses[1]):.1e}"
    )
    assert float(theirs.std()) > 0.3, "the logits are all alike: agreement would say nothing"
    assert difference <= 1e-4
    assert abs(losses[0] - losses[1]) <= 1e-5


def test_shards_index_and_tokenizer(finished_run, tokenizer, tmp_path):
    export_run(finished_run, tmp_path / "one")
    export_run(finished_run, tmp_path / "many", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    whole = load_file(tmp_path / "one" / "model.safetensors")
    parts = {name: value for file in files for name, value in load_file(tmp_path / "many" / file).items()}
    assert parts.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    assert index["metadata"]["total_size"] == sum(value.numel() * 4 for value in whole.values())

    for path in tokenizer.iterdir():
        assert (tmp_path / "one" / path.name).read_bytes() == path.read_bytes()
    text = "def f(x):\n    return x + 10  # naïve\n"
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "one")(text)["input_ids"]
        == load_tokenizer(tokenizer).encode_batch([text])[0]
    )


def test_iteration_dtype_and_refusals(finished_run, tmp_path):
    done = run(
        "checkpoints_convert.convert",
        "to-hf",
        finished_run,
        tmp_path / "hf",
        "--iteration",
        4,
        "--dtype",
        "bf16",
        "--json",
    )
    assert json.loads(done.stdout)["source"].endswith("iter_0000004")
    assert {value.dtype for value in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.bfloat16}

    again = run("checkpoints_convert.convert", "to-hf", finished_run, tmp_path / "hf")
    assert again.returncode == 3
    assert "already exists" in again.stderr
    missing = run("checkpoints_convert.convert", "to-hf", finished_run, tmp_path / "other", "--iteration", 5)
    assert missing.returncode == 4
    assert "no such checkpoint" in missing.stderr
    empty = run("checkpoints_convert.convert", "to-hf", tmp_path, tmp_path / "other")
    assert empty.returncode == 4
    assert "no committed checkpoint" in empty.stderr
    assert not (tmp_path / "other").exists()
    assert "Traceback" not in again.stderr + missing.stderr + empty.stderr


def test_a_damaged_checkpoint_is_not_exported(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    for iteration in (4, 8):
        shard = next(iteration_dir(tmp_path / "run" / "checkpoints", iteration).glob("*.distcp"))
        shard.write_bytes(shard.read_bytes()[:-1])
    done = run("checkpoints_convert.convert", "to-hf", tmp_path / "run", tmp_path / "hf")
    assert done.returncode == 4
    assert ".distcp" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_tokenizer_is_the_one_the_run_began_with(pool, tokens, tokenizer, tmp_path):
    """Whatever happened to its directory since, and wherever the checkpoint was moved."""
    shutil.copytree(tokenizer, tmp_path / "tokenizer")
    run_dir = make_run(pool, "tiny_dense", tokens, tmp_path / "tokenizer", tmp_path / "run")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("{}")
    shutil.move(iteration_dir(run_dir / "checkpoints", 8), tmp_path / "alone")
    shutil.rmtree(run_dir)
    export_run(tmp_path / "alone", tmp_path / "hf")
    for path in tokenizer.iterdir():
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes()
    shutil.rmtree(tmp_path / "tokenizer")
    export_run(tmp_path / "alone", tmp_path / "again")


def test_manifest_and_model_card(finished_run, tmp_path):
    """What a release engineer signs says of every file and tensor what it is."""
    export_run(finished_run, tmp_path / "hf", license_="apache-2.0", max_shard_bytes=100_000)
    noted = json.loads((tmp_path / "hf" / "manifest.json").read_text())
    names = {path.name for path in (tmp_path / "hf").iterdir()} - {"manifest.json"}
    assert noted["files"].keys() == names
    for name, described in noted["files"].items():
        data = (tmp_path / "hf" / name).read_bytes()
        assert described == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    shards = {name: load_file(tmp_path / "hf" / name) for name in names if name.endswith(".safetensors")}
    tensors = {name: value for shard in shards.values() for name, value in shard.items()}
    assert noted["tensors"].keys() == tensors.keys()
    for name, described in noted["tensors"].items():
        assert name in shards[described["file"]]
        assert described["shape"] == list(tensors[name].shape)
        assert described["xxh3_128"] == xxhash.xxh3_128_hexdigest(tensors[name].numpy().tobytes())
    assert noted["source"]["iteration"] == 8
    assert noted["source"]["verified"]
    assert noted["configuration"]["model"]["num_layers"] == 4
    metrics = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    loss = [line["validation_loss"] for line in metrics if line.get("validation_loss") is not None][-1]
    card = (tmp_path / "hf" / "README.md").read_text()
    for text in ("license: apache-2.0", "`Qwen2ForCausalLM`", "| Tokens seen | 2,048 |", f"{loss:.4f} nats", "189,504"):
        assert text in card, text


def test_a_sentencepiece_tokenizer_is_released_in_a_form_that_others_load(finished_run, corpus, tmp_path):
    """transformers would build Qwen2's own tokenizer from the model type, which gives other ids."""
    known = set("abcdefghijklmnopqrstuvwxyz ():+=")  # few letters: the model has room for 320 pieces
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    lines = [json.dumps({"text": "".join(filter(known.__contains__, text.lower()))}) for text in texts]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    words = ["--kind", "sentencepiece", "--vocab-size", 320, "--output", tmp_path / "tok", tmp_path / "few.jsonl"]
    run("tools.data", "tokenizer", "train", *words, check=True)
    export = ["to-hf", finished_run, tmp_path / "hf", "--tokenizer", tmp_path / "tok"]
    done = run("checkpoints_convert.convert", *export, check=True)
    assert "AutoTokenizer does not load this tokenizer rightly" in done.stderr
    card = (tmp_path / "hf/README.md").read_text()
    assert "from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast" in card
    (named,) = re.findall(r"tokenizer = (\w+)\.from_pretrained", card)
    text = "def f(x):\n    return x + 10  # naïve  你好\n"
    ids = load_tokenizer(tmp_path / "tok").encode_batch([text])[0]
    loaded = getattr(transformers, named).from_pretrained(tmp_path / "hf")
    assert loaded(text, add_special_tokens=False)["input_ids"] == ids
    assert loaded.decode(ids) == text
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(text)["input_ids"] != ids
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == (tmp_path / "tok/tokenizer.model").read_bytes()
    prompt = ["--prompt", "def f", "--max-new-tokens", 3, "--json"]
    assert json.loads(run("tools.generate", tmp_path / "hf", *prompt, check=True).stdout)[0]["prompt"] == "def f"
    # A second attempt finds the first one's work complete: the files are a function of the run.
    run("checkpoints_convert.convert", *export, check=True)


def test_verify_compares_the_tokenizers(finished_run, tmp_path):
    export_run(finished_run, tmp_path / "hf")
    path = tmp_path / "hf/tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    path.write_text(json.dumps(content))
    done = run("checkpoints_convert.convert", "verify", finished_run, tmp_path / "hf")
    assert done.returncode == 1
    assert "tokenizer tokenizer.json: differs" in done.stdout
