"""Device-hours of a study, by model."""

import json

import pytest

from launch.sweeps.plan_file import PlanFile
from launch.sweeps.spent import spent
from megatron_qwen.rundir import RunDirectory

STARTED = "2026-01-01T00:00:00+00:00"


def attempt(runs, name, *, ended=None):
    """The run directory of an attempt of two ranks."""
    directory = RunDirectory(runs / name)
    directory.path.mkdir()
    lines = [{"attempt": 1, "started": STARTED, "world_size": 2}]
    if ended is not None:
        lines.append({"attempt": 1, "ended": ended})
    directory.attempts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_stems_count_with_the_cells_that_branch_off_them(tmp_path):
    content = {
        "models": [{"name": "small"}, {"name": "never began"}],
        "stems": [{"name": "stem", "device_hours": 2.0}],
        "cells": [{"name": "cell", "model": "small", "stem": "stem", "device_hours": 1.0}],
    }
    attempt(tmp_path, "stem", ended="2026-01-01T01:00:00+00:00")
    unended = attempt(tmp_path, "cell")  # nobody noted its end: its steps count
    unended.metrics.write_text("".join(json.dumps({"attempt": 1, "step_time_s": 900}) + "\n" for _ in range(2)))
    (found,) = spent(PlanFile(tmp_path / "plan.yaml", content), tmp_path)
    assert (found.model, found.runs, found.planned) == ("small", 2, 3.0)
    assert found.spent == pytest.approx(2.0 + 1.0)
