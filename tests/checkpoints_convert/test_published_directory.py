"""Directories as they are published, downloaded and saved anew: what transformers reads is what is converted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from checkpoints_convert.hf_directory import HfDirectory
from megatron_qwen.data.tokenizers.sentencepiece_form import as_tokenizer_json
from megatron_qwen.data.tokenizers.tokenizer import SOURCE_CONFIG, copy_tokenizer
from megatron_qwen.errors import ConversionError
from megatron_qwen.hf.kept import kept_keys, keys_with_effect
from tests.checkpoints_convert.models import make
from tests.checkpoints_convert.published import MODELS, R1_0528_ROPE
from tests.checkpoints_convert.refusal import assert_untouched, refused
from tests.conftest import run
from tests.tiers import cases

INDEX = "model.safetensors.index.json"


def convert(*words: object, exit_code: int = 0) -> str:
    """Runs ``mq convert``; what it said."""
    done = run("checkpoints_convert.convert", *words)
    assert done.returncode == exit_code, done.stderr
    return done.stdout + done.stderr


def there_and_back(source: Path, folder: Path) -> tuple[Path, str]:
    """The export of a checkpoint of a directory, and what was said on the way."""
    said = convert("from-hf", source, folder / "checkpoint")
    said += convert("to-hf", folder / "checkpoint", folder / "back")
    convert("verify", source, folder / "checkpoint")
    convert("verify", source, folder / "back")
    return folder / "back", said


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def with_tensors(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy with other tensors, in one file."""
    shutil.copytree(source, target)
    tensors = weights(target)
    change(tensors)
    for file in [*target.glob("*.safetensors"), *target.glob(INDEX)]:
        file.unlink()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


# A dense, a tied, an MoE and a Qwen3 model, and one that transformers 5 wrote.
QUICK = [
    "Qwen2.5-0.5B",
    "Qwen2.5-7B-Instruct-1M",
    "Qwen2-57B-A14B-Instruct",
    "Qwen3-30B-A3B",
    "Qwen2.5-1.5B, saved by transformers 5",
]


def published(name: str, directory: Path) -> Path:
    """A random model with a published config.json."""
    config, generation = MODELS[name]
    torch.manual_seed(0)
    fields = {key: value for key, value in config.items() if key not in ("model_type", "dtype", "torch_dtype")}
    read = transformers.AutoConfig.for_model(config["model_type"], **fields)
    for ids in ("eos_token_id", "bos_token_id", "pad_token_id"):
        setattr(read, ids, None)
    transformers.AutoModelForCausalLM.from_config(read).to(torch.bfloat16).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation, indent=2))
    return directory


@pytest.mark.parametrize("name", cases(QUICK, [name for name in MODELS if name not in QUICK]))
def test_every_key_of_a_published_configuration_is_kept(name, tmp_path):
    config, generation = MODELS[name]
    back, said = there_and_back(published(name, tmp_path / "hf"), tmp_path)
    told = json.loads((back / "config.json").read_text())
    assert "rope_theta" in told, "older versions of transformers know it by no other name"
    told = {key: value for key, value in told.items() if key in config or key != "rope_theta"}
    assert told == config
    assert list(told) == list(config), "in the same order, so that a difference can be read"
    written = json.loads((back / "generation_config.json").read_text())
    if generation is None:
        assert written["eos_token_id"] == config["eos_token_id"]
    else:
        assert written == generation
    assert all((key in said) for key in keys_with_effect(config))
    assert ("is not computed here" in said) == bool(keys_with_effect(config))


def test_only_one_published_key_has_an_effect_that_is_not_computed():
    found = {name: list(keys_with_effect(config)) for name, (config, _) in MODELS.items() if keys_with_effect(config)}
    assert found == {"Qwen2.5-7B-Instruct-1M": ["dual_chunk_attention_config"]}


def test_a_published_model_with_yarn_is_refused(tmp_path):
    """The one of the table that has it, with it."""
    source = published("DeepSeek-R1-0528-Qwen3-8B, without YaRN", tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_scaling": R1_0528_ROPE}))
    told = refused("from-hf", source, tmp_path / "out")
    assert "rope_scaling" in told
    assert "yarn" in told


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_mrope", True), ("attn_logit_softcapping", 50.0), ("auto_map", {"AutoModel": "modeling_x.X"}), ("new", 1)],
)
def test_an_unknown_key_is_kept_named_and_compared(key, value, hf, tmp_path):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {key: value}))
    assert key in convert("from-hf", hf, tmp_path / "checkpoint")
    assert key in convert("to-hf", tmp_path / "checkpoint", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())[key] == value
    convert("verify", hf, tmp_path / "back")
    (hf / "config.json").write_text(json.dumps(config))
    assert key in convert("verify", hf, tmp_path / "back", exit_code=1)


def test_where_the_directory_was_made_is_not_repeated(hf, tmp_path):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/someone/model"}))
    assert "_name_or_path" not in json.loads((there_and_back(hf, tmp_path)[0] / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        *((name, True) for name in ("Qwen/Qwen2.5-0.5B", "gpt2", "org/model-checkpoint-7b", "")),
        *((name, False) for name in ("C:\\models\\qwen", "D:/models/qwen", "\\\\server\\share", "..\\qwen", "~/qwen")),
        *(
            (name, False)
            for name in ("./qwen", "../qwen", "a/b/c", "models/qwen", "sft/checkpoint-500", "checkpoint-500")
        ),
    ],
)
def test_which_names_of_a_source_are_repeated(name, kept):
    assert ("_name_or_path" in kept_keys({"_name_or_path": name})) == kept


def test_verify_notices_other_ids(hf, tmp_path):
    other = shutil.copytree(hf, tmp_path / "other")
    config = json.loads((hf / "config.json").read_text())
    for directory, index in ((hf, 4), (other, 5)):
        (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": index}))
    assert "eos_token_id" in convert("verify", hf, other, exit_code=1)
    (other / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    convert("verify", hf, other)
    for directory, ids in ((hf, [4, 5]), (other, [5, 4])):
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids, "temperature": 0.6}))
    convert("verify", hf, other)
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": 4}))
    assert "generation_config.json: eos_token_id: is [4, 5] and [4]" in convert("verify", hf, other, exit_code=1)
    (other / "generation_config.json").unlink()
    convert("verify", hf, other)


def test_the_ids_go_along_with_the_tokenizer(tmp_path, tokenizer):
    """A run that goes on from a published model has its tokenizer, and no other file of it."""
    source = published("Qwen2.5-7B-Instruct", tmp_path / "hf")
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": 3, "bos_token_id": 2}
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").unlink()
    for file in tokenizer.iterdir():
        if file.name != "generation_config.json":
            shutil.copy(file, source)
    copy_tokenizer(source, tmp_path / "run")
    copy_tokenizer(tmp_path / "run", tmp_path / "checkpoint")
    assert json.loads((tmp_path / "checkpoint" / SOURCE_CONFIG).read_text()) == config
    convert("from-hf", hf_without_ids(source, tmp_path / "bare"), tmp_path / "other")
    convert("to-hf", tmp_path / "other", tmp_path / "back", "--tokenizer", tmp_path / "checkpoint")
    back = json.loads((tmp_path / "back/config.json").read_text())
    assert (back["eos_token_id"], back["bos_token_id"]) == (3, 2)
    assert not (tmp_path / "back" / SOURCE_CONFIG).exists()


def hf_without_ids(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if not k.endswith("_token_id")}))
    return target


def as_cache(flat: Path, cache: Path, *, absolute: bool = False) -> Path:
    """A snapshot of a download cache: every file is a link to a blob."""
    snapshot = cache / "snapshots" / ("0123456789abcdef" * 3)[:40]
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(flat.iterdir())):
        blob = cache / "blobs" / f"{number:064x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob if absolute else Path("../../blobs") / blob.name)
    return snapshot


@pytest.mark.parametrize("absolute", [False, True])
def test_a_snapshot_of_a_download_cache(absolute, hf, tmp_path):
    snapshot = as_cache(hf, tmp_path / "models--org--name", absolute=absolute)
    assert weights(there_and_back(snapshot, tmp_path)[0]).keys() == weights(hf).keys()


@pytest.mark.parametrize(
    ("name", "nothing", "told"),
    [
        (INDEX, False, "is a link that leads out of the directory"),
        (INDEX, True, "is a link to nothing"),
        ("config.json", True, "is a link to nothing"),
        ("tokenizer.json", True, "is a link to nothing"),
        ("generation_config.json", False, "is a link that leads out of the directory"),
    ],
)
def test_links_of_other_files(name, nothing, told, hf, tmp_path):
    elsewhere = tmp_path / "elsewhere.json"
    (hf / name).rename(elsewhere) if (hf / name).exists() else elsewhere.write_text("{}")
    (hf / name).symlink_to(elsewhere)
    if nothing:
        elsewhere.unlink()
    said = refused("from-hf", hf, tmp_path / "out")
    assert f"{name}: {told}" in said
    assert_untouched(tmp_path)


def test_an_adapter_beside_the_weights(hf, tmp_path):
    """transformers would load another model than the weights, if peft is installed."""
    save_file({"x": torch.ones(2)}, hf / "adapter_model.safetensors")
    (hf / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert "adapter_config.json: is next to the weights" in refused("from-hf", hf, tmp_path / "out")
    (hf / "adapter_config.json").unlink()
    assert "does not read: adapter_model.safetensors" in convert("from-hf", hf, tmp_path / "out")


def test_a_link_to_a_snapshot(hf, tmp_path):
    (tmp_path / "latest").symlink_to(as_cache(hf, tmp_path / "models--org--name"))
    HfDirectory(tmp_path / "latest")


def test_the_cache_itself_is_told_from_its_snapshots(hf, tmp_path):
    as_cache(hf, tmp_path / "models--org--name")
    assert "0123456789" in refused("from-hf", tmp_path / "models--org--name", tmp_path / "out")


def test_a_download_that_is_not_complete(hf, tmp_path):
    snapshot = as_cache(hf, tmp_path / "models--org--name")
    next(snapshot.glob("model-*1-of*")).resolve().unlink()
    told = refused("from-hf", snapshot, tmp_path / "out")
    assert "is a link to nothing: the download is not complete" in told
    assert_untouched(tmp_path)


def test_links_elsewhere_stay_refused(hf, tmp_path):
    file = next(hf.glob("model-*1-of*"))
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    assert "leads out of the directory" in refused("from-hf", hf, tmp_path / "out")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 988097824\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (POINTER, "is a git-lfs pointer"),
        (b"<!DOCTYPE html><html>404</html>" + b" " * 100, "is a page of HTML"),
        (bytes(4096), "begins with zeros"),
    ],
)
@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", INDEX, "config.json"])
def test_says_what_lies_in_the_place_of_a_file(name, content, told, hf_source, tmp_path):
    hf = shutil.copytree(hf_source, tmp_path / "hf")
    name = sorted(hf.glob("model-*.safetensors"))[0].name if name.startswith("model-") else name
    (hf / name).write_bytes(content)
    said = refused("from-hf", hf, tmp_path / "out")
    assert told in said
    assert name in said


@pytest.mark.parametrize("content", [POINTER, b"<!DOCTYPE html><html>404</html>", bytes(4096)])
def test_every_tokenizer_file_that_is_something_else(content, hf, tmp_path):
    """All at once; a checkpoint would have them as they are."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "generation_config.json")
    for name in names:
        (hf / name).write_bytes(content)
    (hf / "tokenizer_config.json").write_text("{")
    told = refused("from-hf", hf, tmp_path / "out")
    what = {POINTER: "is a git-lfs pointer", bytes(4096): "begins with zeros"}.get(content, "is a page of HTML")
    assert told.count(what) >= len(names)
    assert all(f"{name}: {what}" in told for name in names)
    assert "tokenizer_config.json: is not a JSON object" in told
    assert_untouched(tmp_path)


@pytest.mark.parametrize("content", [POINTER, b"", b"\x12\x00"])
def test_a_tokenizer_model_that_is_none(content, finished_run, tmp_path):
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.model").write_bytes(content)
    told = refused("to-hf", finished_run, tmp_path / "out", "--tokenizer", tmp_path / "tok")
    assert "is a git-lfs pointer" in told if content == POINTER else "not a SentencePiece model" in told
    with pytest.raises(ConversionError, match="is not a SentencePiece model"):
        as_tokenizer_json(tmp_path / "tok/tokenizer.model")


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return make("qwen3 even tied", tmp_path_factory.mktemp("tied") / "hf")


def head_of(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors["model.embed_tokens.weight"].clone()


def test_a_tied_model_that_stores_its_head(tied, tmp_path):
    source = with_tensors(tied, tmp_path / "hf", lambda t: t.update({"lm_head.weight": head_of(t)}))
    back, said = there_and_back(source, tmp_path)
    assert weights(back).keys() == weights(tied).keys()
    assert "tensors that change nothing: lm_head.weight" in said


def test_a_tied_model_that_stores_only_its_head(tied, tmp_path):
    """As safetensors' save_model does, which keeps one name of a tensor with two."""

    def only_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    source = with_tensors(tied, tmp_path / "hf", only_head)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source).get_input_embeddings().weight
    back, said = there_and_back(source, tmp_path)
    assert weights(back).keys() == weights(tied).keys()
    assert torch.equal(weights(back)["model.embed_tokens.weight"], theirs)
    assert "lm_head.weight is read as model.embed_tokens.weight" in said


@pytest.mark.parametrize("change", [lambda head: head + 1, lambda head: head[:-1], lambda head: head.float()])
def test_a_tied_model_with_a_head_of_its_own(change, tied, tmp_path):
    source = with_tensors(tied, tmp_path / "hf", lambda t: t.update({"lm_head.weight": change(head_of(t))}))
    assert "differs from the embedding" in refused("from-hf", source, tmp_path / "out")


def test_frequencies_that_older_programs_stored(hf_source, tmp_path):
    width, base = 16, 50_000.0
    right = base ** (-torch.arange(0, width, 2) / width)
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(3)]
    source = with_tensors(hf_source, tmp_path / "hf", lambda t: t.update({name: right.clone() for name in names}))
    assert weights(there_and_back(source, tmp_path)[0]).keys() == weights(hf_source).keys()
    other = with_tensors(hf_source, tmp_path / "other", lambda t: t.update({names[0]: right * 2}))
    assert "other frequencies than rope_theta" in refused("from-hf", other, tmp_path / "out")


def test_a_tensor_that_no_model_of_the_family_has(hf_source, tmp_path):
    source = with_tensors(hf_source, tmp_path / "hf", lambda t: t.update({"score.weight": torch.ones(2, 48)}))
    assert "do not belong" in refused("from-hf", source, tmp_path / "out")


def test_two_sets_of_weights(hf, tmp_path):
    save_file(weights(hf), hf / "model.safetensors", metadata={"format": "pt"})
    told = refused("from-hf", hf, tmp_path / "out")
    assert "two sets of weights" in told
    assert INDEX in told
    (hf / INDEX).unlink()
    convert("from-hf", hf, tmp_path / "out")


def test_an_index_of_the_single_file(hf_source, tmp_path):
    source = with_tensors(hf_source, tmp_path / "hf", lambda _: None)
    place = dict.fromkeys(weights(source), "model.safetensors")
    (source / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": place}))
    there_and_back(source, tmp_path)


def test_weights_that_the_index_does_not_name_are_said(hf, tmp_path):
    save_file({"x": torch.ones(2)}, hf / "consolidated.safetensors")
    said = convert("from-hf", hf, tmp_path / "out")
    assert "weights that transformers does not read: consolidated.safetensors" in said
