"""Studies on this machine: run to their end, killed, raced, and with parts of them lost."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time

import pytest
import yaml

from launch.sweeps.outcome import outcome
from megatron_qwen.attempts import AttemptLog
from megatron_qwen.rundir import RunDirectory
from tests.conftest import command, environment, run
from tests.tiers import thorough
from tools.scaling import fit_file
from tools.scaling.fit import Settings, fit
from tools.scaling.observations import Observation

FAST = ["--poll", "0.5", "--at-once", "2"]


def write_study(folder, tokens, **changes):
    """A study of one tiny model, two learning rates and two horizons, and its plan."""
    content = {
        "name": "small",
        "recipe": "tiny_dense",
        "overrides": [f"data.path={tokens}", "training.eval_iters=0", "metrics.tensorboard=false"],
        "shapes": {"models": [{"num_layers": 2}]},
        "horizons": {"tokens": [5120, 10240]},
        "learning_rate": {"values": [0.001, 0.004]},
        "batch_tokens": {"values": [256]},
        "device": {"tflops": 0.01},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(content | changes))
    run("launch.sweep", "plan", folder / "study.yaml", check=True)
    return folder / "study.plan.yaml"


def rows(study):
    """What the database holds."""
    with sqlite3.connect(study / "state.sqlite") as database:
        found = database.execute("SELECT name, kind, status, why, loss FROM runs").fetchall()
    return {row[0]: row for row in found}


def begin(words):
    return subprocess.Popen(
        command("launch.sweep", *words), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def attempts(study, name):
    return len(AttemptLog(RunDirectory(study / "runs" / name).attempts).read())


@pytest.fixture(scope="module")
def finished(tokens, tmp_path_factory):
    """A study whose controller was killed twice; one learning rate blows up, one cell cannot be configured."""
    folder = tmp_path_factory.mktemp("study")
    plan = write_study(folder, tokens, learning_rate={"values": [0.001, 0.004, 1000.0]})
    content = yaml.safe_load(plan.read_text())
    bug = next(cell for cell in content["cells"] if cell["name"].endswith("lr0.004_s1234_t1"))
    bug["min_learning_rate"] = 1.0  # above the peak
    plan.write_text(yaml.safe_dump(content))
    study = folder / "small"
    for words in (["submit", str(plan), "--study", str(study)], ["resume", str(study)]):
        process = begin([*words, *FAST])
        assert process.stdout.readline(), process.stderr.read()  # something was handed over
        time.sleep(1.0)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = run("launch.sweep", "resume", study, *FAST, timeout_s=400)
    return study, bug["name"], done


def test_every_run_ends_as_it_should(finished):
    study, bug, done = finished
    assert done.returncode == 1, done.stderr  # one failed
    found = rows(study)
    status = {name: row[2] for name, row in found.items()}
    assert status.pop(bug) == "failed"
    assert "optim.min_learning_rate" in found[bug][3]
    blown = {name for name in status if "lr1e03" in name}
    assert blown
    assert {status.pop(name) for name in blown} == {"diverged"}
    assert set(status.values()) == {"done"}


def test_nothing_ran_twice(finished):
    study, bug, _ = finished
    for name, row in rows(study).items():
        began = (study / "runs" / name).exists()
        assert attempts(study, name) == (1 if began else 0), name
        assert began == (name != bug and "its stem" not in row[3]), name


def test_the_database_is_what_the_directories_say(finished):
    study, _, _ = finished
    lengths = {}
    content = yaml.safe_load((study / "plan.yaml").read_text())
    lengths = {one["name"]: one["iterations"] for one in (*content["stems"], *content["cells"])}
    for name, _, status, _, loss in rows(study).values():
        if not (study / "runs" / name).exists():
            continue
        found = outcome(study / "runs" / name, iterations=lengths[name])
        assert status == found.status
        assert status != "done" or loss == pytest.approx(found.loss)


def test_branches_begin_where_their_stem_was(finished):
    study, _, _ = finished
    for cell in yaml.safe_load((study / "plan.yaml").read_text())["cells"]:
        metrics = study / "runs" / cell["name"] / "metrics.jsonl"
        if metrics.is_file():
            steps = [json.loads(line)["iteration"] for line in metrics.read_text().splitlines()]
            assert steps == list(range(cell["from"] + 1, cell["iterations"] + 1))


def test_fit_reads_the_study_and_refuses_what_determines_no_law(finished):
    study, _, _ = finished
    (study / "fit.json").unlink(missing_ok=True)
    done = run("launch.sweep", "fit", study, "--draws", "20", "--json")
    assert done.returncode == 3
    assert "6 observations: determine no law: " in done.stderr
    assert "2 diverged, not fitted" in done.stderr
    assert "1 failed, not fitted" in done.stderr
    assert (study / "observations.csv").is_file()
    assert not (study / "fit.json").exists()


def test_report(finished):
    study, _, _ = finished
    done = run("launch.sweep", "report", study, check=True)
    page = (study / "report.html").read_text()
    assert f"written: {study / 'report.html'}" in done.stdout
    # Three cells determine no law: the page says so, and leaves no fit from which a run could be prescribed.
    assert not (study / "fit.json").exists()
    assert "fit.json" not in done.stdout
    for told in ("the observations determine no law, and no fit is written", "2 diverged, not fitted", "1 failed, not"):
        assert told in page
        assert f"note: {told}" in done.stdout
    assert "losses are mean of the last" in page or "losses are validation" in page
    for name, row in rows(study).items():
        if row[1] == "cell":
            assert name in page
            assert (f'href="runs/{name}"' in page) == (study / "runs" / name).exists()
    assert "optim.min_learning_rate" in page  # why the cell failed
    assert "device-hours spent" in page
    assert (study / "figures" / "loss_over_compute.png").is_file()
    earlier = study / "earlier.json"
    fit_file.write(earlier, fit_file.document(fit([Observation(1e8, 1e9, 3.0)], Settings()), source="earlier"))
    before = earlier.read_bytes()
    words = ["--standalone", "--output", study / "alone.html", "--fit", earlier]
    done = run("launch.sweep", "report", study, *words, check=True)
    assert 'href="runs/' not in (study / "alone.html").read_text()
    assert earlier.read_bytes() == before
    assert "earlier.json, of an earlier fit, is left as it was" in done.stdout


def test_status(finished):
    study, _, _ = finished
    shown = json.loads(run("launch.sweep", "status", study, "--json", check=True).stdout)
    assert shown["controller"] is None
    assert {row["name"]: row["status"] for row in shown["runs"]} == {name: row[2] for name, row in rows(study).items()}
    assert "not running" in run("launch.sweep", "status", study, check=True).stdout


def test_a_lost_database_is_made_anew_and_a_lost_run_is_run_again(finished, tmp_path):
    study = tmp_path / "small"
    shutil.copytree(finished[0], study)
    plan = yaml.safe_load((study / "plan.yaml").read_text())
    lost = next(cell["name"] for cell in plan["cells"] if cell["learning_rate"] == 0.001)
    before = rows(study)
    (study / "state.sqlite").unlink()
    shutil.rmtree(study / "runs" / lost)
    # The copy's branches still name the stems of the original, which are there.
    done = run("launch.sweep", "resume", study, *FAST, timeout_s=200)
    assert done.returncode == 1, done.stderr
    assert rows(study) == before
    submitted = [line for line in done.stdout.splitlines() if "submitted as job" in line]
    assert len(submitted) == 1
    assert lost in submitted[0]


@thorough("a resumed study meets its lock in every run")
def test_two_controllers(tokens, tmp_path):
    plan = write_study(tmp_path, tokens, learning_rate={"values": [0.001]}, horizons={"tokens": [2560]})
    words = ["submit", str(plan), "--study", str(tmp_path / "small"), *FAST]
    both = [begin(words), begin(words)]
    ends = [(process.communicate(timeout=200), process.returncode) for process in both]
    assert sorted(code for _, code in ends) == [0, 2], ends
    said = next(errors for (_, errors), code in ends if code == 2)
    # The lock says so, or the database where two begin on file systems without locks.
    assert "already has an active controller" in said or "is already controlling this study" in said
    assert "Traceback" not in said
    for name in rows(tmp_path / "small"):
        assert attempts(tmp_path / "small", name) == 1


def test_another_plan_does_not_take_the_directory(finished, tokens, tmp_path):
    plan = write_study(tmp_path, tokens)
    done = run("launch.sweep", "submit", plan, "--study", finished[0])
    assert done.returncode == 2
    assert "differs from the plan" in done.stderr
