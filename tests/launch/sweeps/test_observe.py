"""Cells as observations."""

from launch.sweeps.observe import observe
from launch.sweeps.plan import document, make_plan
from launch.sweeps.plan_file import PlanFile
from tests.launch.sweeps.study_files import study


def test_runs_that_never_began_are_unfinished(tmp_path):
    content = document(make_plan(study(tmp_path)))
    observations, outcomes = observe(PlanFile(tmp_path / "plan.yaml", content), tmp_path / "runs")
    assert len(observations) == len(content["cells"]) == len(outcomes)
    assert {one.status for one in observations} == {"unfinished"}
    cell, first = content["cells"][0], observations[0]
    assert first.batch_tokens * cell["iterations"] == cell["tokens"]
