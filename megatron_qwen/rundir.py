"""The run directory: its files, the configuration it belongs to, and the state of the run."""

import json
import logging
import shutil
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_qwen.attempts import AttemptLog, now
from megatron_qwen.config.blend import read_blend
from megatron_qwen.config.render import difference, dump, to_yaml
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.source import resolve
from megatron_qwen.data.tokenizers.tokenizer import copy_tokenizer
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.files import atomic_write, atomic_write_json, is_temporary, publish
from megatron_qwen.recipes.registry import RECIPES

log = logging.getLogger(__name__)

# A resumed run may change everything except the fields that define the model and the tokens it reads. Lengths, batch
# sizes and the blend may change: the ledger in its checkpoints records the position in every source.
_OWNING_SECTIONS = ("model", "rope", "optim", "objective", "lora")
# Where the decay ends may change with the length, and resume.py tells what that does to the rate.
_FREE_FIELDS = {"optim": ("lr_decay_iters", "lr_wsd_decay_iters")}
_OWNING_FIELDS = {"training": ("seed",), "data": ("path", "tokenizer", "validation_fraction")}


class RunState(StrEnum):
    """The state of a run in status.json."""

    QUEUED = "queued"
    RUNNING = "running"
    REQUEUED = "requeued"
    STOPPED = "stopped"
    CANCELLED = "cancelled"
    DONE = "done"


class RunDirectory:
    """Paths and small files of one run.

    Args:
        path: the directory; created at the first write.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.run_yaml = self.path / "run.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.stragglers = self.path / "stragglers.jsonl"
        self.performance = self.path / "performance.json"
        self.attempts = self.path / "attempts.jsonl"
        self.status = self.path / "status.json"
        self.data = self.path / "data.json"
        self.blend = self.path / "blend.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.reference = self.path / "reference.safetensors"
        self.lora_base = self.path / "lora_base.json"
        self.tokenizer = self.path / "tokenizer"
        self.samples = self.path / "samples.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self.heartbeat = self.path / "heartbeat.json"
        self.metrics_text = self.path / "metrics.prom"
        self.code = self.path / "code"
        self.submission = self.path / "submission"
        self.jobs = self.path / "jobs.jsonl"
        self.submitting = self.path / "submitting.json"
        self.controller_log = self.path / "logs" / "controller.log"

    def logs(self, attempt: int) -> Path:
        """Directory of the output of an attempt's ranks."""
        return self.path / "logs" / f"attempt_{attempt:03d}"

    def owned(self, config: RunConfig) -> RunConfig:
        """The configuration as run.yaml stores it: data.blend names the run's own copy of the blend."""
        return config if config.data.blend is None else config.with_section("data", blend=str(self.blend))

    def claim(self, config: RunConfig, *, data_digest: str | None = None) -> None:
        """Writes run.yaml. If there is one already, checks first that it belongs to the same run.

        The blend file is copied next to it, with absolute paths: later edits of the original take effect only when it
        is passed again.

        Args:
            config: the run.
            data_digest: hash of the token file, if known; with the same hash the file may have moved.

        Raises:
            ConfigError: the directory belongs to another configuration; every differing field is named.
        """
        if self.run_yaml.is_file():
            if problems := self.foreign_problems(config, data_digest=data_digest):
                raise ConfigError(problems)
        elif self.path.is_dir() and not all(map(self._is_of_a_killed_claim, self.path.iterdir())):
            raise ConfigError(
                Problem("--run-dir", self.path, "is not empty and has no run.yaml; choose another directory.")
            )
        try:
            # A job executes code from this directory, so no other user may write to it.
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            if config.data.blend is not None:
                if self.blend.is_file():
                    atomic_write(self.path / "blend.previous.yaml", self.blend.read_text(encoding="utf-8"))
                atomic_write(self.blend, dump(read_blend(Path(config.data.blend)).as_dict()))
            atomic_write(self.run_yaml, to_yaml(self.owned(config)))
            self._keep_tokenizer(config.data.tokenizer)
            if data_digest is not None:
                digest = {"path": config.data.path, "bin_xxh3_128": data_digest}
                atomic_write_json(self.data, digest, indent=None)
        except OSError as error:
            raise ConfigError(Problem("--run-dir", self.path, f"cannot be written ({error.strerror}).")) from None

    def _is_of_a_killed_claim(self, path: Path) -> bool:
        """Whether ``claim`` may have left a file when it was killed before it wrote run.yaml."""
        return is_temporary(path) or path.name in (self.blend.name, "blend.previous.yaml")

    def foreign_problems(self, config: RunConfig, *, data_digest: str | None = None) -> list[Problem]:
        """Every field in which ``config`` differs from the run in this directory; empty if there is no run."""
        if not self.run_yaml.is_file():
            return []
        begun_with = self._data_digest()
        moved = data_digest is not None and data_digest == begun_with
        problems = self._foreign(resolve(str(self.run_yaml), [], RECIPES), config, data_moved=moved)
        if None not in (data_digest, begun_with) and not moved:
            fix = "holds other tokens than those this run started with; use a new --run-dir."
            problems.append(Problem("data.path", config.data.path, fix))
        return problems

    def _keep_tokenizer(self, source: str | None) -> None:
        """Copies the tokenizer at the start of the run: exported models must have the one they were trained with."""
        if source is None or self.tokenizer.exists():
            return
        temporary = self.path / ".tokenizer.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        copy_tokenizer(Path(source), temporary)
        publish(temporary, self.tokenizer)

    def _data_digest(self) -> str | None:
        try:
            return str(json.loads(self.data.read_text())["bin_xxh3_128"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _foreign(self, there: RunConfig, here: RunConfig, *, data_moved: bool) -> list[Problem]:
        changed = difference(here, there)
        fields = [
            (section, name, value)
            for section, body in changed.items()
            for name, value in body.items()
            if name not in _FREE_FIELDS.get(section, ())
            and (section in _OWNING_SECTIONS or name in _OWNING_FIELDS.get(section, ()))
            and not (data_moved and section == "data" and name in ("path", "tokenizer"))
            and not (here.data.blend is not None and (section, name) == ("data", "path"))
        ]
        return [
            Problem(
                f"{section}.{name}",
                value,
                f"differs from {getattr(getattr(there, section), name)} in {self.run_yaml}: the directory belongs to "
                "another configuration; use a new --run-dir.",
            )
            for section, name, value in fields
        ]

    def begin_attempt(self, *, world_size: int) -> int:
        """Records a new attempt of a run without a job controller and returns its number, from 1."""
        number = AttemptLog(self.attempts).begin(world_size=world_size)
        self.write_status(RunState.RUNNING, attempt=number)
        return number

    def end_attempt(self, number: int, *, exit_code: int, reason: str, iteration: int, gained: int) -> None:
        """Records how an attempt of a run without a job controller ended.

        status.json is left to a newer attempt where there is one.
        """
        state = RunState.DONE if exit_code == 0 else RunState.STOPPED
        facts = {"exit_code": exit_code, "reason": reason, "iteration": iteration}
        try:
            AttemptLog(self.attempts).end(number, **facts, iterations_gained=gained)
            if self.newest_attempt() == number:
                self.write_status(state, attempt=number, **facts)
        except OSError as error:  # a full disk must not hide why the attempt ended
            log.warning("the end of attempt %d could not be recorded: %s", number, error)

    def newest_attempt(self) -> int:
        """Number of the newest attempt, 0 before the first."""
        return AttemptLog(self.attempts).newest()

    def is_superseded(self, number: int) -> bool:
        """Whether a newer attempt has begun. Where attempts.jsonl is not to be seen, none is known."""
        return self.newest_attempt() > number

    def state(self) -> RunState | None:
        """The state in status.json; None if there is no readable status.json."""
        try:
            return RunState(str(json.loads(self.status.read_text())["state"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def is_cancelled(self, job_id: str | None) -> bool:
        """Whether a person cancelled a job of the run.

        Args:
            job_id: the job. A run that was submitted again has a newer one, which a word about the old one does not
                concern, whenever that word is written.
        """
        try:
            noted = json.loads(self.status.read_text())
            of = {*map(str, noted.get("jobs") or ()), *([str(noted["job_id"])] if noted.get("job_id") else [])}
            return noted["state"] == RunState.CANCELLED and (not of or job_id is None or job_id in of)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def write_status(self, state: RunState, **facts: Any) -> None:
        """Replaces status.json."""
        atomic_write_json(self.status, {"state": state, "time": now(), **facts})
