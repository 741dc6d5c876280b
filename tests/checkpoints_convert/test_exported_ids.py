"""Whose token ids an export has: those of the tokenizer in it, and of no other file that lies about."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpoints_convert.checkpoint_source import open_checkpoint
from checkpoints_convert.from_hf import ImportOptions, convert
from checkpoints_convert.to_hf import ExportOptions, export
from megatron_qwen.data.tokenizers.named_ids import special_ids
from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer
from tests.checkpoints_convert.models import make, with_tokenizer

GENERATION = "generation_config.json"


def exported(checkpoint: Path, out: Path, tokenizer: Path | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json of an export."""
    export(open_checkpoint(checkpoint, tokenizer=tokenizer), out, ExportOptions(quiet=True, check_everything=False))
    config, generation = ((out / name).read_bytes() for name in ("config.json", GENERATION))
    return json.loads(config), json.loads(generation)


def beside(tokenizer: Path, target: Path, /, **files: dict[str, Any]) -> Path:
    """A copy of a tokenizer with other files next to it."""
    shutil.copytree(tokenizer, target)
    for name, content in files.items():
        (target / f"{name}.json").write_text(json.dumps(content))
    return target


@pytest.fixture(scope="module")
def converted(tokenizer, tmp_path_factory) -> Path:
    """A checkpoint of a published model that stops at other tokens than its documents end with."""
    folder = tmp_path_factory.mktemp("converted")
    source = with_tokenizer(make("qwen2 odd", folder / "hf"), tokenizer)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": 7, "bos_token_id": 6, "pad_token_id": 5}))
    (source / GENERATION).write_text(json.dumps({"eos_token_id": [7, 8], "temperature": 0.6}))
    convert(source, folder / "checkpoint", ImportOptions(quiet=True))
    return folder / "checkpoint"


@pytest.mark.parametrize("ids", [{"eos_token_id": 151_645, "bos_token_id": 151_643}, {"eos_token_id": 3}])
def test_a_config_of_another_model_next_to_the_tokenizer(ids, finished_run, tokenizer, tmp_path):
    """Its ids may be this tokenizer's, of an instruct model: what is trained here ends with the documents' token."""
    directory = beside(tokenizer, tmp_path / "tok", config={"model_type": "qwen2", "vocab_size": 151_936} | ids)
    end = load_tokenizer(tokenizer).end_of_text
    config, generation = exported(finished_run, tmp_path / "hf", directory)
    assert (config["eos_token_id"], config["bos_token_id"], generation["eos_token_id"]) == (end, end, end)


def test_a_config_of_this_model_with_ids_beyond_its_vocabulary(finished_run, tokenizer, tmp_path):
    ours, _ = exported(finished_run, tmp_path / "first")
    for number, (ids, wanted) in enumerate([([3, 99_999], ours["eos_token_id"]), (3, 3)]):
        directory = beside(tokenizer, tmp_path / f"tok{number}", config=ours | {"eos_token_id": ids})
        assert exported(finished_run, tmp_path / f"hf{number}", directory)[0]["eos_token_id"] == wanted


def test_a_generation_config_of_another_model(finished_run, tokenizer, tmp_path, caplog):
    directory = beside(tokenizer, tmp_path / "tok", generation_config={"eos_token_id": [151_645, 151_643]})
    end = load_tokenizer(tokenizer).end_of_text
    config, generation = exported(finished_run, tmp_path / "hf", directory)
    assert config["eos_token_id"] == generation["eos_token_id"] == end
    assert "generation_config.json next to the tokenizer is of another model" in caplog.text


def test_ids_of_a_converted_model_come_back(converted, tmp_path, caplog):
    config, generation = exported(converted, tmp_path / "hf")
    assert [config[f"{name}_token_id"] for name in ("eos", "bos", "pad")] == [7, 6, 5]
    assert generation == {"eos_token_id": [7, 8], "temperature": 0.6}
    assert "does not stop" not in caplog.text, "its publishers wanted it so"


def test_another_tokenizer_has_its_own_ids(converted, tokenizer, tmp_path):
    content = json.loads((tokenizer / "tokenizer.json").read_bytes())
    directory = beside(tokenizer, tmp_path / "tok", tokenizer=content | {"normalizer": None})
    end = load_tokenizer(tokenizer).end_of_text
    config, generation = exported(converted, tmp_path / "hf", directory)
    assert (config["eos_token_id"], config["bos_token_id"], config.get("pad_token_id")) == (end, end, None)
    assert generation["eos_token_id"] == end
    # A copy of the same tokenizer, as is recommended where its files hold a path, changes no id.
    config, generation = exported(converted, tmp_path / "again", beside(tokenizer, tmp_path / "copy"))
    assert (config["eos_token_id"], config["pad_token_id"], generation["eos_token_id"]) == (7, 5, [7, 8])


@pytest.mark.parametrize(("also", "warned"), [(False, True), (True, False)])
def test_warns_where_documents_end_otherwise(also, warned, finished_run, tokenizer, tmp_path, caplog):
    """The tokenizer of an instruct model of this shape: its config.json names the token that ends a turn."""
    ours, _ = exported(finished_run, tmp_path / "first")
    end = load_tokenizer(tokenizer).end_of_text
    files = {"config": ours | {"eos_token_id": end + 2}}
    if also:
        files["generation_config"] = {"eos_token_id": [end + 2, end]}
    caplog.clear()
    config, _ = exported(finished_run, tmp_path / "hf", beside(tokenizer, tmp_path / "tok", **files))
    assert config["eos_token_id"] == end + 2
    assert (f"documents end with id {end}, and eos_token_id is {end + 2}" in caplog.text) == warned


def renamed(tokenizer: Path, target: Path, **config: Any) -> Path:
    """A copy whose control tokens are <x>, <y> and <|im_end|>: no <|endoftext|>."""
    content = json.loads((tokenizer / "tokenizer.json").read_bytes())
    for token, name in zip(content["added_tokens"], ("<x>", "<y>", "<|im_end|>"), strict=True):
        token["content"] = name
    return beside(tokenizer, target, tokenizer=content, tokenizer_config=config)


def test_a_tokenizer_without_an_end_of_documents(tokenizer, tmp_path):
    """The eos_token that it names, though that ends a turn, or none."""
    first = json.loads((tokenizer / "tokenizer.json").read_bytes())["added_tokens"][0]["id"]
    named = renamed(tokenizer, tmp_path / "named", eos_token="<|im_end|>")
    assert special_ids(named, below=1000) == (first + 2, first + 2)
    assert special_ids(named, below=first + 2) == (None, None)
    assert special_ids(renamed(tokenizer, tmp_path / "none"), below=1000) == (None, None)


@pytest.mark.parametrize(
    ("noted", "wanted"),
    [
        ({"eos_token_id": [4, 2], "bos_token_id": 3}, ([4, 2], 3)),
        ({"eos_token_id": 4}, (4, None)),
        ({"eos_token_id": 4, "bos_token_id": 1000}, (4, None)),
        *(({"eos_token_id": ids, "bos_token_id": 3}, None) for ids in ([4, 1000], 1000, -1, True, [], "4")),
    ],
)
def test_ids_of_a_generation_config(noted, wanted, tokenizer, tmp_path):
    end = load_tokenizer(tokenizer).end_of_text
    directory = beside(tokenizer, tmp_path / "tok", generation_config=noted)
    assert special_ids(directory, below=1000) == (wanted or (end, end))
