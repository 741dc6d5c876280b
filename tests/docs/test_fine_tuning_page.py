"""Every command of docs/fine_tuning.md runs as it is typed, on real conversations."""

import json
import re
from pathlib import Path

import chitchat_dataset
import pytest

from launch.demo import standard_library
from tests.conftest import ROOT, run
from tests.data.chat.conftest import template
from tests.docs.page_shell import PageShell

PAGE = (ROOT / "docs" / "fine_tuning.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()  # a command over several lines is one
]
CONVERSATIONS = 400


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Conversations of people, one of whom is taken for the assistant, and text for the base model."""
    root = tmp_path_factory.mktemp("page")
    documents = [document["text"] for document in standard_library(300_000)]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    lines = []
    for turns in list(chitchat_dataset.ConversationDataset())[:CONVERSATIONS]:
        said = [text for text in turns if text.strip()]
        roles = ("user", "assistant")
        messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(said)]
        lines.append(json.dumps({"messages": messages}) + "\n")
    (root / "chats.jsonl").write_text("".join(lines))
    run(
        "tools.data",
        "tokenizer",
        "train",
        "--vocab-size",
        512,
        "--output",
        root / "tok",
        root / "text.jsonl",
        check=True,
    )
    (root / "tok" / "chat_template.jinja").write_text(template("qwen2_5"))
    run(
        "tools.data",
        "prepare",
        "--tokenizer",
        root / "tok",
        "--output",
        root / "data/text",
        root / "text.jsonl",
        check=True,
    )
    return root


def test_the_commands_of_the_page(place, tmp_path):
    shell, said = PageShell(place, tmp_path), {}
    assert len(COMMANDS) == 6
    for line in COMMANDS:
        said[line.split()[1:3][-1] + str(len(said))] = shell.run(line)
    manifest = json.loads((place / "data/chat.json").read_text())
    assert manifest["read"] == CONVERSATIONS
    assert manifest["documents"] + manifest["filtered"] + manifest["skipped"] == CONVERSATIONS
    reasons = manifest["chat"]["reasons"]
    assert sum(reasons.values()) == manifest["filtered"] + manifest["skipped"]
    records = [json.loads(line) for line in (place / "runs/chat/metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == list(range(1, 11))
    assert all(record["loss"] == record["lm_loss"] for record in records)
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["validation_loss"] > 0
    assert 0.2 < records[0]["trained_fraction"] < 0.6
