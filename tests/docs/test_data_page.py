"""Every command of docs/data.md runs as it is typed, in a directory that holds what the page speaks of."""

import json
import re
import shutil
from pathlib import Path

import pytest

from launch.demo import standard_library
from tests.conftest import ROOT
from tests.docs.page_shell import PageShell
from tools.dev.benchmarks.qwen_vocabulary import fetch_ranks

PAGE = (ROOT / "docs" / "data.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()  # a command over several lines is one
]
BLEND = re.search(r"```yaml\n(# blend.yaml\n.*?)```", PAGE, flags=re.DOTALL)[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("page")
    documents = [document["text"] for document in standard_library(900_000)]
    (root / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[::2]))
    (root / "code").mkdir()
    for index, text in enumerate(documents[1::2]):
        (root / "code" / f"{index:03d}.txt").write_text(text)
    question = "Which of these functions gives the absolute path of a file and follows every symbolic link in it?"
    (root / "questions.jsonl").write_text(json.dumps({"text": question}) + "\n")
    shutil.move(fetch_ranks(tmp_path_factory.mktemp("wheel")), root / "qwen.tiktoken")
    (root / "blend.yaml").write_text(BLEND)
    # Without code, with another length, and one more source.
    changed = BLEND.replace("code: {path: data/code, max_epochs: 60}", "all: {path: data/all}").replace("code:", "all:")
    (root / "changed.yaml").write_text(changed.replace("seq_length: 128", "seq_length: 64").replace("{128:", "{64:"))
    return root


def test_the_commands_of_the_page(place, tmp_path):
    assert len(COMMANDS) >= 14
    said = {}
    shell = PageShell(place, tmp_path)
    for line in COMMANDS:
        said.setdefault(line, []).append(shell.run(line))
    assert (place / "lengths.png").stat().st_size > 10_000
    plan = next(text for line, (text, *_) in said.items() if " plan " in line)
    assert "stage short:" in plan
    assert "stage long:" in plan
    lines = [json.loads(line) for line in (place / "runs" / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in lines] == list(range(1, 61))
    assert {record["stage"] for record in lines} == {"short", "long"}
    assert {record["seq_length"] for record in lines} == {64, 128}
    before, after = said["mq data ledger runs/two"]
    assert "code" in before
    assert "all" in after
    assert len(after.splitlines()) > len(before.splitlines())
    samples = said["mq data ledger runs/two --step 12 --tokenizer tok"][0]
    assert samples.count("sample ") == lines[11]["global_batch_size"]


def test_the_page_names_every_key():
    for key in ("packing", "fim_rate", "fim_spm_rate", "max_epochs", "budgets", "lengths", "rotary_base"):
        assert f"`{key}`" in PAGE, key
