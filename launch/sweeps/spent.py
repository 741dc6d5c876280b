"""What the runs of a study have cost, in device-hours."""

from pathlib import Path

from launch.sweeps.plan_file import PlanFile
from megatron_qwen.attempts import AttemptLog
from megatron_qwen.rundir import RunDirectory
from tools.run_records import read_lines
from tools.scaling.study_results import Spent


def spent(plan: PlanFile, runs: Path) -> list[Spent]:
    """Device-hours by model, small models first."""
    content = plan.content
    model_of = {str(cell["name"]): str(cell["model"]) for cell in content["cells"]}
    model_of |= {str(cell["stem"]): str(cell["model"]) for cell in content["cells"] if "stem" in cell}
    found: dict[str, list[tuple[float, float]]] = {str(model["name"]): [] for model in content["models"]}
    for run in (*content["stems"], *content["cells"]):
        name = str(run["name"])
        found[model_of[name]].append((float(run.get("device_hours") or 0.0), device_hours(runs / name)))
    return [
        Spent(model, len(each), sum(planned for planned, _ in each), sum(used for _, used in each))
        for model, each in found.items()
        if each
    ]


def device_hours(run_dir: Path) -> float:
    """Of all attempts at a run; one whose end nobody noted counts its steps."""
    directory = RunDirectory(run_dir)
    total = 0.0
    for attempt in AttemptLog(directory.attempts).read():
        seconds = attempt.wall_s
        if seconds is None:
            records = (one for one in read_lines(directory.metrics) if one.get("attempt") == attempt.number)
            seconds = sum(float(one.get("step_time_s") or 0.0) for one in records)
        total += seconds * (attempt.world_size or 1)
    return total / 3600
