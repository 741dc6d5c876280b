"""Every command of docs/convert.md runs, in a directory that holds what the page speaks of."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from checkpoints_convert.convert import main
from checkpoints_convert.from_hf import ImportOptions, convert
from megatron_qwen.config.render import to_yaml
from megatron_qwen.config.source import resolve
from megatron_qwen.recipes.registry import RECIPES
from tests.checkpoints_convert.models import make, with_tokenizer

PAGE = Path(__file__).parent.parent.parent / "docs" / "convert.md"
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()  # a command over several lines is one
]


@pytest.fixture(scope="module")
def place(finished_run, tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    shutil.copytree(finished_run, root / "runs" / "first")
    published = with_tokenizer(make("qwen2 even tied", root / "hf" / "Qwen2.5-0.5B"), tokenizer)
    shutil.copytree(tokenizer, root / "tok")
    convert(published, root / "theirs", ImportOptions(quiet=True))
    foreign = root / "megatron" / "iter_0005000"
    shutil.copytree(root / "theirs" / "checkpoints" / "iter_0000000", foreign)
    for name in ("run.yaml", "state.json", "manifest.json", "tokenizer"):
        shutil.rmtree(foreign / name) if (foreign / name).is_dir() else (foreign / name).unlink()
    (root / "configs").mkdir()
    (root / "configs" / "theirs.yaml").write_text((root / "theirs" / "run.yaml").read_text())
    shape = ["num_layers=8", "hidden_size=48", "num_attention_heads=8", "num_query_groups=4", "kv_channels=16"]
    experts = ["num_moe_experts=8", "moe_router_topk=4", "moe_ffn_hidden_size=18", "moe_router_pre_softmax=false"]
    fields = [f"model.{field}" for field in shape + experts]
    (root / "configs" / "mixture.yaml").write_text(to_yaml(resolve("tiny_moe", fields, RECIPES)))
    return root


def test_the_commands_of_the_page(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert len(COMMANDS) >= 10
    for line in COMMANDS:
        program, action, *words = shlex.split(line)
        assert (program, action) == ("mq", "convert"), line
        assert main(words) == 0, line
    assert (place / "change.png").is_file()
    assert (place / "out" / "theirs" / "tokenizer.json").is_file()
