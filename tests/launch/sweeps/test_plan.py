"""Plans: every combination once, priced, whole grids within the budget."""

import json

import pytest
import yaml

from launch.sweeps.cells import shapes
from launch.sweeps.plan import document, make_plan
from launch.sweeps.study import read_study
from megatron_qwen.config.source import resolve
from megatron_qwen.errors import ConfigError
from megatron_qwen.estimate.flops import training_flops_per_token
from megatron_qwen.recipes.registry import RECIPES
from tests.conftest import run
from tests.launch.sweeps.study_files import CLUSTER, STUDY, study


def test_every_combination_once(tmp_path):
    plan = make_plan(study(tmp_path))
    assert len(plan.cells) == 4 * 3 * 5 * 2 * 2
    assert len({cell.name for cell in plan.cells}) == len(plan.cells)
    assert len(plan.stems) == 4 * 5 * 2 * 2
    assert not plan.dropped
    ladder = [shape.params for shape in shapes(plan.study)]
    assert ladder == sorted(ladder)


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


def test_the_rope_base_of_a_study_is_that_of_its_cells(tmp_path):
    """Also where the study names the field's earlier place; its plan says what the study says."""
    now, before = (make_plan(study(tmp_path, overrides=[f"{name}=5e5"])) for name in ("rope.base", "model.rotary_base"))
    assert {cell.config().rope.base for cell in now.cells} == {5e5}
    assert [cell.config() for cell in now.cells] == [cell.config() for cell in before.cells]
    ours, theirs = document(now), document(before)
    assert theirs["overrides"] == ["model.rotary_base=5e5"]
    assert {name for name in ours if ours[name] != theirs[name]} == {"overrides", "study"}


def test_a_model_that_does_not_fit_is_dropped_with_its_reason(tmp_path):
    plan = make_plan(study(tmp_path, **CLUSTER | {"shapes": {"params": [44e6, 70e9]}}))
    assert [one.reason for one in plan.dropped if "GiB" in one.reason]
    assert {cell.placed.shape.name for cell in plan.cells} == {plan.placed[0].shape.name}
    small = make_plan(study(tmp_path, device={"tflops": 0.1, "memory_gib": 0.3}))
    assert any("needs" in one.reason for one in small.dropped)


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


def test_settings_that_are_nearly_equal_are_refused(tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | {"learning_rate": {"values": [0.001, 0.0010001]}}))
    with pytest.raises(ConfigError, match="nearly equal"):
        make_plan(read_study(tmp_path / "study.yaml"))
