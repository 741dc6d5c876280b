"""Study files, their cells and what these cost."""

import json

import pytest
import yaml

from megatron_qwen.config.checks import problems
from megatron_qwen.config.source import resolve
from megatron_qwen.estimate.flops import training_flops_per_token
from megatron_qwen.recipes.registry import RECIPES
from tests.conftest import run
from tools.scaling.cells import cells, place, shapes
from tools.scaling.plan import document, make_plan
from tools.scaling.study import read_study

STUDY = {
    "recipe": "demo",
    "shapes": {"low": 1e5, "high": 2e6, "count": 4},
    "horizons": {"tokens_per_param": [10, 20, 40]},
    "learning_rate": {"low": 1e-3, "high": 1.6e-2, "count": 5},
    "batch_tokens": {"values": [4096, 16384]},
    "seeds": [1, 2],
    "device": {"tflops": 0.1},
}
CLUSTER = STUDY | {
    "recipe": "qwen2_5_0_5b",
    "shapes": {"params": [44e6, 358e6, 3e9]},
    "batch_tokens": {"values": [524288]},
    "device": {"gpu": "h100", "count": 8},
}


def study(tmp_path, **changes):
    """A plan of the study with some fields otherwise; None leaves one out."""
    content = {name: value for name, value in (STUDY | changes).items() if value is not None}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return read_study(path)


def test_every_combination_once(tmp_path):
    plan = make_plan(study(tmp_path))
    assert len(plan.cells) == 4 * 3 * 5 * 2 * 2
    assert len({cell.name for cell in plan.cells}) == len(plan.cells)
    assert len(plan.stems) == 4 * 5 * 2 * 2
    assert not plan.dropped
    ladder = [shape.params for shape in shapes(plan.study)]
    assert ladder == sorted(ladder)


def test_horizons_share_a_stem(tmp_path):
    """Every branch decays from its own point of one constant run, and the whole is cheaper than a run a horizon."""
    plan = make_plan(study(tmp_path))
    for stem in plan.stems:
        assert len(stem.branches) == 3
        assert stem.iterations == max(cell.branch_point for cell in stem.branches)
        for cell in stem.branches:
            assert cell.decay == pytest.approx(0.2 * cell.iterations, abs=1)
            assert cell.tokens == pytest.approx(cell.placed.shape.params * [10, 20, 40][cell.horizon], rel=0.05)
    cosine = make_plan(study(tmp_path, schedule="cosine"))
    assert not cosine.stems
    # 10 + 20 + 40 against 0.8 x 40 + 0.2 x 70.
    assert plan.device_hours / cosine.device_hours == pytest.approx(46 / 70, rel=0.02)


def test_cost_is_what_the_rate_says(tmp_path):
    plan = make_plan(study(tmp_path, schedule="cosine"))
    for cell in plan.cells:
        flops = training_flops_per_token(cell.placed.shape.model, cell.placed.config.data.seq_length) * cell.tokens
        assert plan.hours(cell) == pytest.approx(flops / 0.1e12 / 3600)


def test_budget_keeps_whole_grids_and_says_what_it_drops(tmp_path):
    whole = make_plan(study(tmp_path))
    half = make_plan(study(tmp_path, budget_hours=whole.device_hours / 4))
    assert half.device_hours <= whole.device_hours / 4
    assert half.cells
    assert len(half.cells) + sum(one.cells for one in half.dropped) == len(whole.cells)
    largest = max(cell.placed.shape.params * cell.tokens for cell in half.cells)
    assert all("budget" in one.reason for one in half.dropped)
    for cell in half.cells:  # no hole: all settings of the same model and horizon are there
        mates = [
            one for one in half.cells if one.horizon == cell.horizon and one.placed.shape.name == cell.placed.shape.name
        ]
        assert len(mates) == 5 * 2 * 2
    kept = {cell.name for cell in half.cells}
    assert all(cell.placed.shape.params * cell.tokens >= largest * 0.9 for cell in whole.cells if cell.name not in kept)


def test_cells_are_legal_runs(tmp_path):
    for content in ({}, CLUSTER):
        plan = make_plan(study(tmp_path, **content))
        for cell in plan.cells[::17]:
            config = cell.config()
            assert not list(problems(config, world_size=plan.study.device.count))
            assert config.training.train_iters == cell.iterations
            assert config.optim.lr_wsd_decay_iters == cell.decay


def test_overrides_of_the_plan_make_the_models(tmp_path):
    """What the file says is enough to build the run."""
    plan = make_plan(study(tmp_path, **CLUSTER))
    for model, placed in zip(document(plan)["models"], plan.placed, strict=True):
        words = [
            f"{name}={'null' if value is None else str(value).lower()}" for name, value in model["overrides"].items()
        ]
        again = resolve("qwen2_5_0_5b", words, RECIPES)
        assert again.model == placed.shape.model
        assert again.parallel == placed.config.parallel


def test_a_model_that_does_not_fit_is_dropped_with_its_reason(tmp_path):
    plan = make_plan(study(tmp_path, **CLUSTER | {"shapes": {"params": [44e6, 70e9]}}))
    assert [one.reason for one in plan.dropped if "GiB" in one.reason]
    assert {cell.placed.shape.name for cell in plan.cells} == {plan.placed[0].shape.name}
    small = make_plan(study(tmp_path, device={"tflops": 0.1, "memory_gib": 0.3}))
    assert any("needs" in one.reason for one in small.dropped)


def test_mixtures_have_their_counts(tmp_path):
    content = study(tmp_path, recipe="tiny_moe", batch_tokens={"values": [2048]})
    rungs = shapes(content)
    assert all(shape.total > shape.params and shape.granularity for shape in rungs)
    found = list(cells(content, [place(content, shape, 2048) for shape in rungs]))
    assert len(found) == 4 * 3 * 5 * 2


def test_models_by_hand(tmp_path):
    models = [{"num_layers": 2}, {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2}]
    plan = make_plan(study(tmp_path, shapes={"models": models}))
    assert {cell.placed.shape.model.num_layers for cell in plan.cells} == {2, 4}


def test_all_wrong_fields_at_once(tmp_path):
    wrong = {
        "recipe": "demo",
        "overrides": ["optim.lerning_rate=1"],
        "shapes": {"low": 5, "high": 1, "count": 0},
        "horizons": {"tokens_per_param": [10], "tokens": [1e6]},
        "learning_rate": {"values": [0.1, -1, "x"]},
        "batch": {"values": [4096]},
        "schedule": "linear",
        "seeds": [1, 1],
        "device": {"gpu": "h100", "tflops": 1},
        "budget_hours": 0,
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(wrong))
    done = run("launch.sweep", "plan", str(path))
    assert done.returncode == 2
    for word in (
        "optim.lerning_rate", "shapes.count", "horizons", "learning_rate.values", "batch: no such field",
        "batch_tokens", "schedule = 'linear'", "seeds", "takes gpu, or tflops", "budget_hours",
    ):  # fmt: skip
        assert word in done.stderr, word
    assert "Traceback" not in done.stderr
    assert [one.name for one in tmp_path.iterdir()] == ["study.yaml"]


def test_a_device_whose_speed_is_not_known(tmp_path):
    """fp32 on an H100 has no rate: the study is told to give one."""
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"device": {"gpu": "h100"}}))
    done = run("launch.sweep", "plan", str(path))
    assert done.returncode == 2
    assert "device.tflops" in done.stderr


def test_the_command_writes_what_it_shows(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"budget_hours": 2}))
    shown = json.loads(run("launch.sweep", "plan", str(path), "--json", check=True).stdout)
    written = yaml.safe_load((tmp_path / "study.plan.yaml").read_text())
    assert [cell["name"] for cell in written["cells"]] == [cell["name"] for cell in shown["cells"]]
    assert shown["device_hours"] <= 2
    text = run("launch.sweep", "plan", str(path), check=True).stdout
    assert "dropped" in text
    assert "device-hours" in text
