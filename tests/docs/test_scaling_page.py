"""Every command of docs/scaling_laws.md runs, on the study and the data that the page speaks of."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from launch.sweep import main
from launch.sweeps.arguments import parser

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "scaling_laws.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()  # a command over several lines is one
]


def test_the_commands_of_the_page(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "tests" / "tools" / "scaling" / "published", tmp_path / "published")
    (study,) = re.findall(r"```yaml\n(# study.yaml.*?)```", TEXT, flags=re.DOTALL)
    (tmp_path / "study.yaml").write_text(study)
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) == 6
    for line in COMMANDS:
        program, action, *words = shlex.split(line)
        assert (program, action) == ("mq", "sweep"), line
        if "runs/study" in words:  # takes a study that has run (tests/launch/sweeps/test_metric.py)
            assert parser().parse_args(words).source == Path("runs/study")
            continue
        assert main(words) == 0, line
    for name in ("study.plan.yaml", "step_law.json", "chinchilla.json", "run.yaml", "budget.yaml"):
        assert (tmp_path / name).is_file(), name


STUDY = ROOT / "docs" / "studies" / "python_cpu"
STUDY_COMMANDS = [
    line.removeprefix("$ mq sweep ")
    for line in re.findall(r"```console\n(.*?)```", TEXT, flags=re.DOTALL)[0].splitlines()
]


def test_the_study_on_two_cores_is_planned_as_the_page_says(tmp_path, monkeypatch):
    (tmp_path / "docs" / "studies").mkdir(parents=True)
    shutil.copy(STUDY.with_suffix(".yaml"), tmp_path / "docs" / "studies")
    monkeypatch.chdir(tmp_path)
    plan, submit, report = map(shlex.split, STUDY_COMMANDS)
    assert main(plan) == 0
    planned = yaml.safe_load((tmp_path / submit[1]).read_text())
    assert (len(planned["cells"]), len(planned["stems"])) == (60, 20)
    assert planned["device_hours"] < 2 * 1.0  # an hour of two cores
    assert parser().parse_args(submit).at_once == 2
    assert str(parser().parse_args(report).source) == f"runs/{planned['name']}"
    # What lies in docs is of this plan.
    names = {line.split(",")[-1] for line in (STUDY / "observations.csv").read_text().splitlines()[1:]}
    assert names == {cell["name"] for cell in planned["cells"]}


def test_the_study_says_what_the_page_says_it_does(tmp_path):
    shutil.copy(STUDY / "observations.csv", tmp_path / "cells.csv")
    assert main(["fit", str(tmp_path / "cells.csv")]) == 0
    found = json.loads((tmp_path / "cells.fit.json").read_text())
    error = found["headline"]["leave_largest_out_error"]
    assert error < 0.03
    (said,) = re.findall(r"the four smaller ones within ([0-9.]+) %", TEXT)
    assert float(said) == pytest.approx(100 * error, abs=0.006)
    assert f"{error:.2%}" in (STUDY / "report.html").read_text()
    assert found["counts"] == {"done": 60, "diverged": 0, "failed": 0, "unfinished": 0}
