"""``mq plan`` at a terminal: tables, JSON, the picture, overrides that run, calibration, and wrong input."""

import json

import pytest

from megatron_qwen.config.checks import problems
from megatron_qwen.config.source import resolve
from megatron_qwen.recipes.registry import RECIPES
from tests.conftest import run


def plan(*words, check=True):
    return run("tools.plan", *words, check=check)


def test_table():
    text = plan("qwen2_5_72b", "--gpus", 1024, "--gpu", "h100", "--top", 3).stdout
    lines = text.splitlines()
    assert "tokens/s/GPU" in lines[1]
    assert len(lines) == 6
    assert "layouts fit" in lines[-1]


def test_every_rejected_layout_has_a_reason():
    plain = json.loads(plan("qwen2_57b_a14b", "--gpus", 256, "--gpu", "h100", "--json").stdout)
    assert plain["rejected"]
    assert all(one["reason"] for one in plain["rejected"])
    shown = plan("qwen2_57b_a14b", "--gpus", 256, "--gpu", "h100", "--rejected").stdout
    assert shown.count("\n  ") == len(plain["rejected"])


def test_overrides_give_the_layout():
    words = plan("qwen2_5_7b", "--gpus", 16, "--gpu", "h200", "--precision", "fp8", "--emit").stdout.split()
    config = resolve("qwen2_5_7b", words, RECIPES)
    best = json.loads(plan("qwen2_5_7b", "--gpus", 16, "--gpu", "h200", "--precision", "fp8", "--json").stdout)
    assert not problems(config, world_size=16)
    assert best["layouts"][0]["overrides"] == words
    assert config.training.micro_batch_size == best["layouts"][0]["micro_batch_size"]
    assert config.precision.fp8 == "tensorwise"


def test_picture(tmp_path):
    plan("qwen2_5_14b", "--gpus", 8, "--gpu", "h200", "--png", tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_sequence_length_and_imbalance_change_the_plan():
    def best(*words):
        document = json.loads(plan("qwen3_30b_a3b", "--gpus", 16, "--gpu", "h100", "--json", *words).stdout)
        return document["layouts"][0]["tokens_per_second_per_device"]

    assert best("--sequence-length", 32768) < best()
    assert best("--imbalance", 2.0) < best()
    assert best("--achieved", 0.5) < 0.6 * best()


def make_run(folder, config, speed, devices, steps=12):
    from megatron_qwen.config.render import to_yaml

    folder.mkdir()
    (folder / "run.yaml").write_text(to_yaml(config))
    lines = [
        {"iteration": step, "tokens_per_second": speed * devices * (0.1 if step < 4 else 1),
         "tokens_per_second_per_device": speed * (0.1 if step < 4 else 1)}
        for step in range(1, steps + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_calibration(tmp_path):
    """Runs at 0.7 of the peak rates give 0.7 back."""
    from megatron_qwen.estimate.assumptions import Assumptions
    from megatron_qwen.estimate.hardware import hardware
    from megatron_qwen.estimate.step_time import step_time

    config, runs = RECIPES["qwen2_5_7b"](), []
    for devices in (8, 64):
        time = step_time(config, device=hardware("h200"), world_size=devices, assumptions=Assumptions(achieved=0.7))
        make_run(tmp_path / f"run{devices}", config, time.tokens / time.seconds / devices, devices)
        runs.append(tmp_path / f"run{devices}")
    answer = json.loads(plan("--calibrate", *runs, "--gpu", "h200", "--json").stdout)
    assert answer["achieved"] == pytest.approx(0.7, rel=1e-3)
    assert [one["devices"] for one in answer["runs"]] == [8, 64]
    assert all(one["ratio"] == pytest.approx(1, rel=1e-3) for one in answer["runs"])
    assert "--achieved 0.7" in plan("--calibrate", *runs, "--gpu", "h200").stdout


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ([], 2, "needs a recipe"),
        (["qwen2_5_7b"], 2, "--gpus"),
        (["qwen2_5_7b", "--gpus", "0"], 2, "--gpus"),
        (["qwen2_5_7b", "--gpus", "8", "--gpu", "tpu"], 2, "use one of"),
        (["qwen2_5_7b", "--gpus", "8", "--gpu", "a100", "--precision", "fp8"], 2, "set precision.fp8=null"),
        (["qwen2_5_72b", "--gpus", "4", "--gpu", "h100"], 2, "the smallest needs"),
        (["qwen2_5_7b", "--gpus", "1000"], 2, "the simplest one, one device, says"),
        (["tiny_dense", "--gpus", "4"], 2, "set precision.dtype=bf16"),
        (["qwen2_5_7b", "--gpus", "8", "data.blend=blend.yaml"], 2, "plan each"),
        (["qwen2_5_7b", "--gpus", "8", "--imbalance", "-1"], 2, "at least 1"),
        (["qwen2_5_7b", "--gpus", "8", "--sequence-length", "1"], 2, "--sequence-length"),
        (["qwen2_5_7b", "--gpus", "8", "--achieved", "0"], 2, "--achieved"),
        (["qwen2_5_7b", "--gpus", "8", "model.num_layer=3"], 2, "Did you mean"),
        (["--calibrate", "nowhere", "--gpu", "h200"], 2, "nowhere"),
    ],
)
def test_wrong_input(words, code, text):
    done = plan(*words, check=False)
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_too_short_a_run(tmp_path):
    make_run(tmp_path / "short", RECIPES["qwen2_5_7b"](), 1000.0, 8, steps=3)
    done = plan("--calibrate", tmp_path / "short", "--gpu", "h200", check=False)
    assert done.returncode == 3
    assert "let it run longer" in done.stderr
