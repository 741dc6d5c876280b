"""Rounds of an adaptive study: grids grow to where the optimum is, whole, and within the budget."""

import math
from dataclasses import replace

import numpy as np
import pytest
import yaml

from launch.sweeps import adapt
from launch.sweeps.plan import document, make_plan
from launch.sweeps.plan_file import PlanFile, merged
from launch.sweeps.study import read_study
from tools.scaling.fit import Settings, fit
from tools.scaling.observations import Observation
from tools.scaling.optimum import EDGE_HIGH, EDGE_LOW

STUDY = {
    "recipe": "tiny_dense",
    "shapes": {"models": [{"num_layers": 2}, {"num_layers": 4}, {"num_layers": 8}]},
    "horizons": {"tokens": [1e5, 3e5, 9e5]},
    "learning_rate": {"values": [1e-4, 2e-4, 4e-4]},
    "batch_tokens": {"values": [256]},
    "device": {"tflops": 0.01},
    "adaptive_rounds": 5,
}


def planned(folder, **changes):
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY | changes))
    return PlanFile(folder / "plan.yaml", document(make_plan(read_study(folder / "study.yaml"))))


def observed(plan, *, best_rate, best_batch=None, noise=0.0, curvature=0.02):
    """Every cell as a law with these best settings has it."""
    generator = np.random.default_rng(0)
    found = []
    for cell in plan.content["cells"]:
        n, d = plan.model(cell)["params"], cell["tokens"]
        batch = d / cell["iterations"]
        away = 0.5 * curvature * math.log(cell["learning_rate"] / best_rate) ** 2
        away += 0.0 if best_batch is None else 0.5 * curvature * math.log(batch / best_batch) ** 2
        loss = (1.8 + 40 / n**0.3 + 80 / d**0.3) * math.exp(away + noise * generator.standard_normal())
        found.append(Observation(n, d, loss, learning_rate=cell["learning_rate"], batch_tokens=batch))
    return found


def _next(plan, observations):
    return adapt.next_round(plan, observations, fit(observations, Settings(draws=20)))


def rounds(plan, **law):
    """All rounds; the last plan, and how many there were."""
    added = []
    while len(added) < plan.content["adaptive_rounds"]:
        now = merged(plan, added)
        found = _next(now, observed(now, **law))
        if found is None:
            break
        added.append(PlanFile(plan.path, document(found)))
    return merged(plan, added), len(added)


def rates(plan, model=None):
    return sorted({cell["learning_rate"] for cell in plan.content["cells"] if model in (None, cell["model"])})


@pytest.mark.parametrize(("best", "wanted"), [(1.2e-3, 1.6e-3), (4e-5, 2.5e-5)])
def test_a_grid_grows_until_the_optimum_lies_in_it(tmp_path, best, wanted):
    plan, count = rounds(planned(tmp_path), best_rate=best)
    assert 1 <= count < 5
    found = rates(plan)
    assert found[0] < best < found[-1]
    assert min(abs(math.log(rate / wanted)) for rate in found) < 0.01
    assert np.diff(np.log(found)) == pytest.approx(math.log(2), abs=0.01)
    flags = {flag for one in fit(observed(plan, best_rate=best), Settings(draws=20)).optima for flag in one.flags}
    assert not flags & {EDGE_LOW, EDGE_HIGH}


def test_all_horizons_get_the_new_value_from_one_stem(tmp_path):
    plan, _ = rounds(planned(tmp_path), best_rate=1e-3)
    for model in plan.content["models"]:
        for rate in rates(plan, model["name"]):
            cells = [
                cell
                for cell in plan.content["cells"]
                if (cell["model"], cell["learning_rate"]) == (model["name"], rate)
            ]
            assert len(cells) == 3
            (stem,) = {cell["stem"] for cell in cells}
            (found,) = [one for one in plan.content["stems"] if one["name"] == stem]
            assert found["save_at"] == sorted(cell["from"] for cell in cells)


def test_where_the_optimum_is_inside_nothing_is_added(tmp_path):
    assert rounds(planned(tmp_path), best_rate=2e-4)[1] == 0


def test_a_batch_at_the_edge_brings_all_its_rates(tmp_path):
    plan = planned(
        tmp_path, batch_tokens={"values": [256, 512, 1024]}, learning_rate={"values": [1e-4, 2e-4, 4e-4, 8e-4]}
    )
    found, count = rounds(plan, best_rate=3e-4, best_batch=1500)
    assert count == 1
    batches = {(cell["sequences"], cell["learning_rate"]) for cell in found.content["cells"]}
    assert {sequences for sequences, _ in batches} == {4, 8, 16, 32}
    assert len(batches) == 16


def test_noise_that_hides_the_optimum_widens_both_ends(tmp_path):
    plan = planned(tmp_path, adaptive_rounds=1)
    found, _ = rounds(plan, best_rate=2e-4, noise=0.02, curvature=0.001)
    assert rates(found)[0] < 0.9e-4
    assert rates(found)[-1] > 4.1e-4


def test_the_budget_holds(tmp_path):
    free = planned(tmp_path)
    cost = free.content["device_hours"]
    tight = planned(tmp_path, budget_hours=cost * 1.2)
    found, count = rounds(tight, best_rate=5e-3)
    assert count >= 1
    assert found.content["device_hours"] <= cost * 1.2
    assert any("device-hours of the budget remain" in one["reason"] for one in found.content["dropped"])
    assert len(found.content["cells"]) > len(free.content["cells"])


def test_nothing_is_tried_beyond_what_has_diverged(tmp_path):
    plan = planned(tmp_path, adaptive_rounds=1, learning_rate={"values": [1e-4, 2e-4, 4e-4, 8e-4]})
    observations = observed(plan, best_rate=2e-4, noise=0.02, curvature=0.001)
    blown = [
        replace(one, status="diverged", loss=math.nan) if one.learning_rate > 5e-4 else one for one in observations
    ]
    assert max(cell.learning_rate for cell in _next(plan, observations).cells) > 1e-3
    assert max(cell.learning_rate for cell in _next(plan, blown).cells) < 1e-4


def test_the_budget_of_the_plan_is_the_one_that_people_see(tmp_path):
    plan = planned(tmp_path)
    plan.content["budget_hours"] = plan.content["device_hours"]  # lowered in the plan, not in the study
    found = _next(plan, observed(plan, best_rate=5e-3))
    assert not found.cells
    assert found.dropped


def test_a_rate_of_the_same_name_is_not_planned_again(tmp_path):
    plan = planned(tmp_path, learning_rate={"values": [1.004e-4, 1.006e-4]}, adaptive_rounds=1)
    assert _next(plan, observed(plan, best_rate=5e-3)) is None


def test_renamed_cells_are_no_matter(tmp_path):
    plan = planned(tmp_path)
    for number, cell in enumerate(plan.content["cells"]):
        cell["name"] = f"mine{number}"
    assert len(_next(plan, observed(plan, best_rate=1e-3)).cells) == 9
