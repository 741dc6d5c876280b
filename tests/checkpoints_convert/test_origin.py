"""A released directory names data and checkpoint for a reader elsewhere, not by where they lay on this machine."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
import yaml

from checkpoints_convert.checkpoint_source import open_checkpoint
from checkpoints_convert.origin import data_origin
from checkpoints_convert.to_hf import ExportOptions, export
from megatron_qwen.checkpoint.paths import iteration_dir
from megatron_qwen.config.source import resolve
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from tests.conftest import make_run, run
from tests.distributed import jobs


def exported_texts(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def blend_run(pool, tokens, tokenizer, tmp_path):
    """A run over two sources that began with another run's weights, all of it under the directory of the test."""
    for name in ("web", "code"):
        for path in tokens.parent.glob(f"{tokens.name}.*"):
            shutil.copyfile(path, tmp_path / f"{name}_tokens{path.name.removeprefix(tokens.name)}")
    shutil.copytree(tokenizer, tmp_path / "tokenizer")
    sources = {name: {"path": str(tmp_path / f"{name}_tokens")} for name in ("web", "code")}
    stages = [{"name": "main", "weights": {"web": 0.5, "code": 0.5}}]
    (tmp_path / "blend.yaml").write_text(json.dumps({"sources": sources, "stages": stages}))
    first = make_run(pool, "tiny_dense", tmp_path / "web_tokens", tmp_path / "tokenizer", tmp_path / "first")
    files = [f"data.blend={tmp_path / 'blend.yaml'}", f"data.tokenizer={tmp_path / 'tokenizer'}"]
    words = [*files, f"checkpoint.load={first}", "training.train_iters=2"]
    config = resolve("tiny_dense", words, RECIPES)
    run_dir = tmp_path / "second"
    RunDirectory(run_dir).claim(config)
    assert pool[1].run(jobs.attempt, config, run_dir) == [0]
    return run_dir


def test_no_file_tells_where_things_lay(blend_run, tmp_path):
    """A released directory names data and checkpoint as a reader elsewhere can use it, whatever the run was given."""
    export(open_checkpoint(blend_run), tmp_path / "hf", ExportOptions(quiet=True))
    where = str(tmp_path).encode()
    assert [name for name, content in exported_texts(tmp_path / "hf").items() if where in content] == []
    noted = json.loads((tmp_path / "hf" / "manifest.json").read_text())
    checkpoint = iteration_dir(blend_run / "checkpoints", 2)
    digest = xxhash.xxh3_128_hexdigest((checkpoint / "manifest.json").read_bytes())
    assert (noted["source"]["name"], noted["source"]["run"]) == (checkpoint.name, "second")
    assert noted["source"]["xxh3_128"] == digest
    tokens = xxhash.xxh3_128_hexdigest((tmp_path / "web_tokens.bin").read_bytes())
    assert [(one["name"], one["xxh3_128"]) for one in noted["data"]] == [("code", tokens), ("web", tokens)]
    assert noted["configuration"]["data"]["blend"] == "blend.yaml"
    assert noted["configuration"]["data"]["tokenizer"] == "tokenizer"
    assert noted["configuration"]["checkpoint"]["load"] == "first"
    card = (tmp_path / "hf" / "README.md").read_text()
    for text in ("`code` (", "`web` (", f"xxh3-128 `{tokens}`", f"manifest xxh3-128 `{digest}`", "of `second`"):
        assert text in card, text
    # What the release says is enough to compare with, and to find that all is done already.
    for b in (blend_run, tmp_path / "hf" / "manifest.json"):
        done = run("checkpoints_convert.convert", "verify", tmp_path / "hf", b)
        assert done.returncode == 0, done.stdout + done.stderr
    again = run("checkpoints_convert.convert", "to-hf", blend_run, tmp_path / "hf", "--json", check=True)
    assert json.loads(again.stdout)["complete_before"]


def test_local_paths_are_told_where_they_are_asked_for(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    run("checkpoints_convert.convert", "to-hf", tmp_path / "run", tmp_path / "hf", "--local-paths", check=True)
    noted = json.loads((tmp_path / "hf" / "manifest.json").read_text())
    config = yaml.safe_load((finished_run / "run.yaml").read_text())
    checkpoint = iteration_dir(tmp_path / "run" / "checkpoints", 8)
    assert noted["source"]["path"] == str(checkpoint)
    assert noted["data"][0]["path"] == noted["configuration"]["data"]["path"] == config["data"]["path"]
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"`{config['data']['path']}`" in card
    assert str(checkpoint) in card
    # Another answer to the question is another directory.
    other = run("checkpoints_convert.convert", "to-hf", tmp_path / "run", tmp_path / "hf")
    assert other.returncode == 3


def test_a_local_path_in_the_tokenizer_is_warned_about(finished_run, tokenizer, tmp_path):
    shutil.copytree(tokenizer, tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name_or_path": "/cluster/somebody/tokenizer"}))
    words = ("to-hf", finished_run, tmp_path / "hf", "--tokenizer", tmp_path / "tokenizer")
    done = run("checkpoints_convert.convert", *words, check=True)
    assert "/cluster/somebody/tokenizer" in done.stderr
    assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes()


def test_data_that_is_not_recorded_has_at_least_a_name(finished_run, tmp_path):
    source = open_checkpoint(finished_run)
    bare = replace(source, state={}, config=source.config.with_section("data", path="/cluster/web/corpus", blend=None))
    assert data_origin(bare, local_paths=False) == [{"name": "corpus", "xxh3_128": None}]
    assert data_origin(bare, local_paths=True)[0]["path"] == "/cluster/web/corpus"
    nothing = replace(source, state={"data": {"sources": {}}}, config=source.config.with_section("data", path=None))
    assert data_origin(nothing, local_paths=False) == []
