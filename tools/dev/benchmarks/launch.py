"""``mq bench launch``: how long an infra engineer waits for a plan of a big run, and for the table of many."""

import json
import subprocess
import tempfile
import time
from pathlib import Path

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.config.render import to_yaml
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory, RunState
from tools.dev.benchmarks.rows import BenchmarkRow, against_limit

_MQ = Path(__file__).resolve().parents[3] / "mq"
_RUNS, _STEPS = 500, 400
_DRY_RUN_LIMIT_S, _STATUS_LIMIT_S = 1.5, 2.0
_STATES = (RunState.DONE, RunState.RUNNING, RunState.STOPPED, RunState.REQUEUED)


def run(*, rounds: int) -> list[BenchmarkRow]:
    """Times both commands as whole processes, ``rounds`` times in turn after one turn that does not count."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number in range(_RUNS):
            _make_run(root / f"run_{number:03d}", _STATES[number % len(_STATES)])
        plan = ("launch", "dry-run", "qwen2_5_72b", "--nodes", "128")
        table = ("launch", "status", folder)
        seconds: dict[tuple[str, ...], list[float]] = {plan: [], table: []}
        for turn in range(rounds + 1):
            for command, times in seconds.items():
                started = time.perf_counter()
                subprocess.run([_MQ, *command], stdout=subprocess.DEVNULL, check=True)
                if turn:
                    times.append(time.perf_counter() - started)
    conditions = f"{rounds} rounds"
    return [
        against_limit(f"mq {' '.join(plan)}", seconds[plan], limit=_DRY_RUN_LIMIT_S, unit="s", conditions=conditions),
        against_limit(
            f"mq launch status, {_RUNS} runs", seconds[table], limit=_STATUS_LIMIT_S, unit="s", conditions=conditions
        ),
    ]


def _make_run(path: Path, state: RunState) -> None:
    """What a run of some hundred steps and two attempts leaves."""
    directory = RunDirectory(path)
    path.mkdir()
    directory.run_yaml.write_text(to_yaml(RECIPES["qwen2_5_7b"]()))
    directory.write_status(state, attempt=2, reason="a reason", iteration=_STEPS)
    attempts = AttemptLog(directory.attempts)
    for _ in range(2):
        attempts.end(attempts.begin(nodes=["n1", "n2"]), reason="preempted", exit_code=75, iteration=_STEPS)
    record = {"lm_loss": 2.5, "grad_norm": 0.3, "tokens_per_second": 1e5, "step_time_s": 4.2, "learning_rate": 3e-4}
    lines = [json.dumps({"iteration": step + 1, **record}) for step in range(_STEPS)]
    directory.metrics.write_text("\n".join(lines) + "\n")
    entry = {"jobs": [str(1000 + hash(path.name) % 1000)], "scheduler": "slurm", "cluster": "cpu", "nodes": 2}
    directory.jobs.write_text(json.dumps(entry) + "\n")
