"""When a run saves, with times that are made up."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.config.checkpoint import CheckpointConfig
from megatron_qwen.estimate.save_interval import lost_share
from megatron_qwen.resilience.rules import Reason
from megatron_qwen.rundir import RunDirectory


def saves(settings: CheckpointConfig, last: int, cost_s: float, **known: Any) -> dict[str, Any]:
    """Iterations that a run of two-second steps saves at, with the same cost every time; on a rank."""
    import torch.distributed as dist

    from megatron_qwen.training.save_schedule import SaveSchedule

    schedule = SaveSchedule(settings, fault_s=10_000, **{"resumed_at": 0, **known})
    made = []
    for iteration in range(known.get("resumed_at", 0) + 1, last + 1):
        # Ranks measure different times: rank 0's count.
        if schedule.is_due(iteration, 2.0 + dist.get_rank()):
            made.append(iteration)
            schedule.saved(iteration, cost_s * (1 + dist.get_rank()))
    return {"made": made, "advice": schedule.as_dict()}


def saves_after_a_local_one(every: list[CheckpointConfig]) -> list[list[int]]:
    """What runs with these settings save up to iteration 150, resumed at 83 with a checkpoint of 70."""
    return [saves(settings, 150, 50.0, resumed_at=83, saved_at=70)["made"] for settings in every]


def saves_committed_late(settings: CheckpointConfig) -> list[int]:
    """Iterations saved by a run whose saves are committed seven steps later."""
    from megatron_qwen.training.save_schedule import SaveSchedule

    schedule, made = SaveSchedule(settings, fault_s=10_000, resumed_at=0, earlier_cost_s=0.05), []
    for iteration in range(1, 60):
        if schedule.is_due(iteration, 2.0):
            made.append(iteration)
            schedule.begun(iteration)
        if iteration - 7 in made:
            schedule.saved(iteration - 7, 0.05)
    return made


def known_to(missing: Path, there: Path) -> list[Any]:
    """What a rank takes for the mean time between faults and the cost of a save; rank 1 sees no files."""
    import torch.distributed as dist

    from megatron_qwen.training.save_schedule import build_schedule

    directory = RunDirectory(there if dist.get_rank() == 0 else missing)
    schedule = build_schedule(CheckpointConfig(), directory, saved_at=0, resumed_at=0, restart_s=1.0)
    return [schedule._fault_s, *schedule._costs]


def ask(pool, settings: CheckpointConfig, last: int, cost_s: float = 50.0, known: dict[str, Any] | None = None):
    """What both ranks did, and what rank 0 advises."""
    first, second = pool[2].run(saves_with, settings, last, cost_s, known or {})
    assert first["made"] == second["made"]
    return first["made"], first["advice"]


def saves_with(settings: CheckpointConfig, last: int, cost_s: float, known: dict[str, Any]) -> dict[str, Any]:
    return saves(settings, last, cost_s, **known)


def test_a_number_is_kept_and_judged(pool):
    made, advice = ask(pool, CheckpointConfig(save_interval=100, save_at=(150,)), 320)
    assert made == [100, 150, 200, 300]
    # Daly: 966.9 s of training between saves, 483 steps.
    assert (advice["iterations"], advice["best"]) == (100, 483)
    assert advice["lost"] == pytest.approx(lost_share(200, cost_s=50, fault_s=10_000))
    assert ask(pool, CheckpointConfig(save_interval=0), 320) == ([], None)


def test_null_is_the_interval_that_loses_the_least(pool):
    """The first after ten minutes, which tells what a save costs."""
    made, advice = ask(pool, CheckpointConfig(save_interval=None), 1300)
    assert made == [300, 783, 1266]
    assert (advice["iterations"], advice["best"]) == (483, 483)


def test_a_later_attempt_knows_the_cost(pool):
    made, _ = ask(pool, CheckpointConfig(save_interval=None), 1700, known={"resumed_at": 700, "earlier_cost_s": 50.0})
    assert made == [1183, 1666]


def test_checkpoints_that_are_kept_are_saved_at_their_multiples(pool):
    made, _ = ask(pool, CheckpointConfig(save_interval=None, keep_every=500, save_at=(10,)), 1100)
    assert made == [10, 493, 500, 983, 1000]


def test_faults_are_those_of_the_nodes_and_of_the_run(tmp_path: Path):
    from megatron_qwen.training.save_schedule import _fault_s

    directory = RunDirectory(tmp_path)
    (tmp_path / "job.json").write_text(json.dumps({"mean_hours_between_faults": 100.0}))
    log = AttemptLog(directory.attempts)
    log.begin(nodes=["a", "b"])
    assert _fault_s(directory) == 50 * 3600
    log.end(1, reason=str(Reason.LOST_NODE))
    log.begin(nodes=["a", "b"])
    assert _fault_s(directory) == pytest.approx(25 * 3600, abs=10)
    log.end(2, reason=str(Reason.PREEMPTED))
    log.begin(nodes=["a", "b"])
    assert _fault_s(directory) == pytest.approx(25 * 3600, abs=10), "a preemption is no fault"
    log.end(3, reason=str(Reason.CORRUPTION))
    assert _fault_s(directory) == pytest.approx(100 * 3600 / 6, abs=10), "a faulty node is one"
    log.begin(nodes=["a", "b"])
    log.end(4, reason=str(Reason.STRAGGLER))
    assert _fault_s(directory) == pytest.approx(100 * 3600 / 6, abs=10), "a slow node is none"


def test_a_save_that_is_committed_late_is_made_once(pool):
    """16 steps of 2 s: sqrt(2 * 0.05 s * 10,000 s) = 31.6 s."""
    assert pool[1].run(saves_committed_late, CheckpointConfig(save_interval=None)) == [[16, 32, 48]]


def test_a_save_that_was_due_before_a_local_checkpoint_is_made_up_for(pool):
    """The newest checkpoint is that of iteration 70, the local one of 83."""
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({"save_interval": 40}, [84, 120]),
        ({"save_interval": 90, "save_at": (80, 83, 84)}, [84, 90]),
        ({"save_interval": 60}, [120]),
        ({"save_interval": 0}, []),
        ({"save_interval": None, "keep_every": 81}, [84]),
        ({"save_interval": None, "keep_every": 60}, [120]),
    ]
    found = pool[1].run(saves_after_a_local_one, [CheckpointConfig(**settings) for settings, _ in cases])
    assert found == [[made for _, made in cases]]


def test_rank_0_reads_what_earlier_attempts_have_measured(pool, tmp_path):
    (tmp_path / "job.json").write_text(json.dumps({"mean_hours_between_faults": 100.0}))
    (tmp_path / "performance.json").write_text(json.dumps({"saving": {"cost_s": 12.5}}))
    assert pool[2].run(known_to, tmp_path / "none", tmp_path) == [[360_000, 12.5]] * 2
