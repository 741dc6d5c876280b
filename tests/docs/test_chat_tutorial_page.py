"""Every command of docs/chat_tutorial.md runs, in the page's order; with fewer steps than a reader takes."""

import json
import re
import sys

from tests.conftest import ROOT, run
from tests.docs.page_shell import PageShell
from tests.tiers import thorough

PAGE = (ROOT / "docs" / "chat_tutorial.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
STEPS = 400


def test_files_are_named_before_they_are_used():
    """What the reader types is all there is."""
    made = [re.match(r"# (\S+)\n", text)[1] for kind, text in BLOCKS if kind != "sh"]
    assert made == ["chats.py", "chat_template.jinja", "tasks/replies.yaml", "talk.py"]
    assert f"training.train_iters={STEPS}" in PAGE


@thorough("tests of fine-tuning, evaluation, generation and export by themselves")
def test_the_commands_of_the_page(tmp_path, tmp_path_factory):
    run("launch.demo", "--output", tmp_path / "demo-run", "--steps", 40, "--layout", "pp=2", timeout_s=400, check=True)
    shell, printed = PageShell(tmp_path, tmp_path_factory.mktemp("shell")), {}
    for kind, text in BLOCKS:
        if kind == "sh":
            block = text.replace(f"training.train_iters={STEPS}", "training.train_iters=60")
            block = re.sub(r"^python ", f"{sys.executable} ", block, flags=re.MULTILINE)
            printed[text.split()[0] + " " + text.split()[1]] = shell.run(block, timeout_s=500)
        else:
            name, body = re.match(r"# (\S+)\n(.*)", text, flags=re.DOTALL).groups()
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(body)
    records = [json.loads(line) for line in (tmp_path / "runs/chat/metrics.jsonl").read_text().splitlines()]
    assert records[-1]["validation_loss"] < records[0]["loss"] - 0.3
    assert records[-1]["end_probability"] > 20 * records[0]["end_probability"]
    assert "replies" in printed["mq eval"]
    assert printed["python talk.py"].strip()
    generation = json.loads((tmp_path / "chat/hf/generation_config.json").read_text())
    assert len(generation["eos_token_id"]) == 2
