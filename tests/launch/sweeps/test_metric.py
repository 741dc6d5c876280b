"""Laws of a score of a study's runs: the fit is of the score, and says what a larger model will have."""

import json
import math

import numpy as np
import pytest
import yaml

from launch.sweeps.study_directory import StudyDirectory
from megatron_qwen.attempts import AttemptLog
from megatron_qwen.rundir import RunDirectory, RunState
from tests.conftest import run

BITS, SHARE, LOGPROB = "eval/arc_easy/gold_bits_per_byte", "eval/arc_easy/acc_norm", "eval/arc_easy/gold_logprob"
TARGET = (4e6, 4e8)


def bits(params, tokens):
    return 0.4 + 20 / params**0.3 + 30 / tokens**0.28


def share(value):
    return 0.25 + 0.7 / (1 + math.exp((value - 0.9) / 0.15))


@pytest.fixture(scope="module")
def study(tokens, tmp_path_factory):
    """A study of five sizes and three horizons whose runs have ended, with scores drawn from a law."""
    folder = tmp_path_factory.mktemp("scores")
    content = {
        "name": "scores",
        "recipe": "tiny_dense",
        "overrides": [f"data.path={tokens}"],
        "shapes": {"models": [{"hidden_size": size, "ffn_hidden_size": 3 * size} for size in (16, 32, 64, 96, 128)]},
        "horizons": {"tokens": [512_000, 4_096_000, 32_768_000]},
        "learning_rate": {"values": [0.001]},
        "batch_tokens": {"values": [4096]},
        "device": {"tflops": 0.01},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    run("launch.sweep", "plan", folder / "study.yaml", check=True)
    found = StudyDirectory(folder / "scores")
    from launch.sweeps.plan_file import read_plan

    plan, generator = read_plan(folder / "study.plan.yaml"), np.random.default_rng(0)
    found.claim(plan)
    for cell in plan.content["cells"]:
        directory, model = RunDirectory(found.runs / cell["name"]), plan.model(cell)
        directory.path.mkdir(parents=True)
        value = bits(model["params"], cell["tokens"]) * math.exp(0.003 * generator.standard_normal())
        scores = {BITS: value, SHARE: share(value), LOGPROB: -20 * value, "validation_loss": 1 + value}
        first = {"iteration": cell["iterations"] - 1, "lm_loss": 3.0}
        last = {"iteration": cell["iterations"], "lm_loss": 3.0, **scores}
        directory.metrics.write_text(f"{json.dumps(first)}\n{json.dumps(last)}\n")
        log = AttemptLog(directory.attempts)
        log.end(log.begin(world_size=1), exit_code=0, reason="finished")
        directory.write_status(RunState.DONE)
    return found.path


def fitted(study, *words):
    return run("launch.sweep", "fit", study, "--draws", 200, "--json", *words)


def test_the_score_of_a_larger_model(study):
    words = ("--metric", BITS, "--score", SHARE, "--predict", f"{TARGET[0]:g},{TARGET[1]:g}")
    done = fitted(study, *words)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["metric"] == BITS
    (found,) = content["predictions"]
    assert found["interval"][0] <= bits(*TARGET) <= found["interval"][1]
    assert found["value"] == pytest.approx(bits(*TARGET), rel=0.03)
    score = found["score"]
    assert (score["name"], score["models"]) == (SHARE, 15)
    assert score["interval"][0] <= share(bits(*TARGET)) <= score["interval"][1]
    assert score["value"] == pytest.approx(share(bits(*TARGET)), abs=0.03)
    # Beside the fit of the loss, which it leaves alone.
    assert (study / "fit.arc_easy-gold_bits_per_byte.json").is_file()
    assert not (study / "fit.json").exists()
    text = run("launch.sweep", "fit", study, "--draws", 200, *words, check=True).stdout
    assert f"L is {BITS}" in text
    assert "predicted at N = 4e+06, D = 4e+08" in text
    head = ("prescribe", study / "fit.arc_easy-gold_bits_per_byte.json", "--recipe", "qwen2_5_0_5b", "--gpus", 1)
    printed = run("launch.sweep", *head, "--params", 1e6, "--tokens", 1e8, check=True).stdout
    assert f"# Predicted {BITS} 0." in printed


def test_a_log_probability_is_fitted_with_its_sign_changed(study):
    content = json.loads(fitted(study, "--metric", LOGPROB).stdout)
    assert math.exp(min(content["points"]["log_loss"])) == pytest.approx(20 * 0.7, rel=0.4)
    assert min(content["points"]["log_loss"]) > 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--metric", SHARE), 2, "no power law describes; fit eval/arc_easy/gold_bits"),
        (("--metric", "eval/arc_easy/gold_bits_per_bite"), 3, f"Did you mean {BITS}?"),
        (("--metric", BITS, "--predict", "4e6"), 2, "--predict = 4e6: must be two numbers above 0"),
        (("--metric", BITS, "--predict", "7e12,1e15"), 2, "a fit is not reliable there"),
        (("--metric", BITS, "--score", SHARE), 2, "say for what (--predict PARAMS,TOKENS)"),
    ],
)
def test_what_is_refused(study, words, code, said):
    done = fitted(study, *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_csv_has_columns(tmp_path):
    (tmp_path / "runs.csv").write_text("params,tokens,loss\n1e6,1e8,3\n")
    done = run("launch.sweep", "fit", tmp_path / "runs.csv", "--metric", BITS)
    assert done.returncode == 2
    assert "of a CSV say which column it is: --columns loss=COLUMN" in done.stderr
