"""A run of five steps on two ranks, as ``mq train`` makes it, whose every figure can be worked out."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_qwen.config.run import RunConfig
from megatron_qwen.rundir import RunDirectory
from tests.distributed import jobs
from tests.training.cases import config_of


@dataclass(frozen=True)
class ReportedRun:
    """A finished run directory, its configuration and the lines of metrics.jsonl."""

    path: Path
    config: RunConfig
    records: list[dict[str, Any]]


@pytest.fixture(scope="session")
def reported(pool, starts, masked_documents, tmp_path_factory) -> ReportedRun:
    """Validates after steps 3 and 5 on two batches of eight: all sixteen held-out windows once."""
    run_dir = tmp_path_factory.mktemp("reported") / "run"
    validation = {"eval_interval": 3, "eval_iters": 2}
    kept = {"save_interval": 3, "keep_last": 5}
    config = config_of(
        "tiny_dense", masked_documents, starts["tiny_dense"], training=validation, checkpoint=kept,
        data={"validation_fraction": 0.1},
    )  # fmt: skip
    RunDirectory(run_dir).claim(config)
    assert pool[2].run(jobs.attempt, config, run_dir) == [0, 0]
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return ReportedRun(run_dir, config, records)
