"""The programs at a terminal: what they print, and that help and configuration need no torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_qwen.recipes.registry import RECIPES
from tests.conftest import ROOT, environment, run

PROGRAMS = [
    "launch.command",
    "launch.setup", "launch.demo",
    "launch.doctor", "launch.sweep", "launch.train", "tools.recipes", "tools.config", "tools.plan", "tools.data",
    "tools.generate", "tools.eval", "tools.report", "tools.serve", "tools.dev.bench", "tools.dev.check", "tools.docs",
    "checkpoints_convert.convert",
]  # fmt: skip
HEAVY = {"torch", "megatron", "numpy", "transformers", "matplotlib", "mkdocs"}


def imported(*arguments: str) -> set[str]:
    """Top-level packages that a program has imported when it ends."""
    command = [sys.executable, "-X", "importtime", "-P", "-m", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    names = [line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_has_examples_and_needs_no_torch(program):
    assert not imported(program, "--help") & HEAVY
    text = run(program, "--help", check=True).stdout
    assert text.startswith("usage: mq ")
    assert "examples:" in text


def test_showing_a_configuration_needs_no_torch():
    assert not imported("tools.config", "show", "qwen2_5_72b") & HEAVY
    assert not imported("tools.recipes") & HEAVY


def test_config_show():
    shown = yaml.safe_load(run("tools.config", "show", "qwen2_5_72b", check=True).stdout)
    assert shown["model"]["num_layers"] == 80
    assert list(shown)[:4] == ["recipe", "model", "rope", "parallel"]
    changed = run("tools.config", "show", "qwen2_5_72b", "optim.clip_grad=0.5", "--diff", check=True).stdout
    assert yaml.safe_load(changed) == {"optim": {"clip_grad": 0.5}}
    wrong = run("tools.config", "show", "qwen2_5_72b", "optim.clip=0.5")
    assert wrong.returncode == 2
    assert "Did you mean optim.clip_grad?" in wrong.stderr


def test_recipes():
    rows = json.loads(run("tools.recipes", "--json", check=True).stdout)
    assert [row["recipe"] for row in rows] == list(RECIPES)
    assert {"parameters", "active", "layers", "layout"} <= rows[0].keys()
    text = run("tools.recipes", check=True).stdout
    assert "7,615,616,512" in text
    assert text.count("STAND-IN") == 5


def test_report_is_one_file(finished_run, tmp_path):
    page = tmp_path / "report.html"
    assert run("tools.report", finished_run, "--output", page, check=True).stdout.strip() == str(page)
    text = page.read_text()
    assert text.count("<svg") == 3
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    for word in ("validation loss", "tokens per second", "Attempts", "finished", "12 x layers x heads"):
        assert word in text
    missing = run("tools.report", tmp_path)
    assert missing.returncode == 2
    assert "not a run directory" in missing.stderr


def test_report_of_a_run_that_ended_badly(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    last = json.loads((finished_run / "metrics.jsonl").read_text().splitlines()[-1])
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({**last, "iteration": 9, "lm_loss": None, "skipped": True}) + "\n" + '{"iteration": 10, "lm'
        )
    with (tmp_path / "run" / "attempts.jsonl").open("a") as file:
        file.write('{"attempt": 2, "started": "2026-01-01T00:00:00+00:00"}\n{"attempt": 3, "star')
    run("tools.report", tmp_path / "run", check=True)
    text = (tmp_path / "run" / "report.html").read_text()
    for word in ("still running, or killed", "steps skipped", "peak memory"):
        assert word in text
    unwritable = run("tools.report", tmp_path / "run", "--output", "/proc/none/report.html")
    assert unwritable.returncode == 1
    assert "Traceback" not in unwritable.stderr


def test_a_closed_pipe_is_no_traceback():
    shell = f"'{sys.executable}' -P -m tools.config show qwen2_5_72b | head -1"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, env=environment(), cwd="/", check=True)
    assert done.stdout == "recipe: qwen2_5_72b\n"
    assert "Traceback" not in done.stderr


def test_documents_name_programs_that_exist():
    programs = run_mq_list()
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for line in path.read_text().splitlines():
            words = line.strip().removeprefix("$ ").split()
            if words and words[0] == "./mq" and len(words) > 1 and words[1].isalpha():
                assert words[1] in programs, f"{path.name}: {line}"


def run_mq_list() -> set[str]:
    listed = subprocess.run([ROOT / "mq"], capture_output=True, text=True, check=True).stdout
    return {line.split()[1] for line in listed.splitlines() if line.startswith("  mq ")}


def test_every_program_of_mq_is_a_module():
    text = (ROOT / "mq").read_text().split("programs='")[1].split("'")[0]
    modules = [line.split()[1] for line in text.strip().splitlines()]
    assert sorted(modules) == sorted(PROGRAMS)
    for module in modules:
        path = ROOT / Path(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
