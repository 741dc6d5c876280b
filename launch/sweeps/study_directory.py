"""A study's directory: its plan, its database and the run directories of its stems and cells."""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.sweeps.plan_file import PlanFile, merged, read_plan
from megatron_qwen.checkpoint.paths import committed
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.files import LockHeldError, atomic_write, exclusive_lock, is_temporary, sync_stream
from megatron_qwen.json_lines import objects
from megatron_qwen.rundir import RunDirectory

STEM, CELL = "stem", "cell"
_LOCK = ".controller.lock"
# A branch may begin so much of its length late.
_NEAR = 0.1


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Args:
        name: of its directory and its job.
        kind: stem or cell.
        iterations: at which it is done.
        stem: name of the run that it branches off, or None.
        begins: iteration of the stem at which it begins.
        overrides: of the recipe; ``StudyDirectory.overrides`` has those of a branch too.
        shape: model and batch, which runs of one array share.
    """

    name: str
    kind: str
    iterations: int
    stem: str | None
    begins: int
    overrides: tuple[str, ...]
    shape: str


class StudyDirectory:
    """Where a study lies.

    Args:
        path: the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()  # one name for it: jobs are told by where their run lies
        self.plan_yaml = self.path / "plan.yaml"
        self.database = self.path / "state.sqlite"
        self.runs = self.path / "runs"
        self.arrays_jsonl = self.path / "arrays.jsonl"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps two controllers apart, also where the database that names the first was deleted.

        Raises:
            ConfigError: another one is at work.
        """

        def warn(said: str) -> None:
            print(f"warning: {said}: run one controller only", file=sys.stderr)

        with ExitStack() as stack:
            try:
                stack.enter_context(exclusive_lock(self.path / _LOCK, timeout_s=0, without_locks=warn))
            except LockHeldError:
                fix = "already has an active controller, and its runs continue. See `mq sweep status`."
                raise ConfigError(Problem("STUDY", self.path, fix)) from None
            yield

    def claim(self, plan: PlanFile) -> None:
        """Copies the plan, or checks that the one there is the same.

        Raises:
            ConfigError: another plan owns the directory, or something else does.
        """
        if self.plan_yaml.is_file():
            if self.plan_yaml.read_bytes() != plan.path.read_bytes():
                fix = (
                    f"differs from the plan in {self.path}; give the study another name, or continue that study with "
                    "`mq sweep resume`."
                )
                raise ConfigError(Problem("PLAN", plan.path, fix))
            return
        begun = {self.runs.name, self.database.name, _LOCK}  # by a command that was killed here
        there = {one.name for one in self.path.iterdir() if not is_temporary(one)} if self.path.exists() else set()
        if there - begun:
            raise ConfigError(
                Problem("study", self.path, "is not empty and has no plan.yaml; choose another directory.")
            )
        self.runs.mkdir(parents=True, exist_ok=True, mode=0o700)
        atomic_write(self.plan_yaml, plan.path.read_bytes())

    def job_name(self, run: "StudyRun") -> str:
        """Name of a run's job: another study of the same models has others."""
        return f"{run.name[:90]}.{self._mark()}"

    def _mark(self) -> str:
        return hashlib.sha256(str(self.path).encode()).hexdigest()[:6]

    def note_array(self, runs: Sequence[StudyRun]) -> str:
        """Notes which runs are about to go as one array, and names it: who is killed then finds it by its name."""
        text = self.arrays_jsonl.read_bytes() if self.arrays_jsonl.is_file() else b""
        # Slurm's lists are read by their separators: a name holds none, whatever the directory is called.
        study = re.sub(r"[^A-Za-z0-9._-]", "_", self.path.name)[:80]
        name = f"{study}.{self._mark()}.a{len(text.splitlines()) + 1}"
        torn = "" if not text or text.endswith(b"\n") else "\n"  # by a full disk
        with self.arrays_jsonl.open("a") as file:
            file.write(f"{torn}{json.dumps({'name': name, 'runs': [run.name for run in runs]})}\n")
            sync_stream(file)
        return name

    def arrays(self) -> dict[str, list[str]]:
        """Runs of every array, by its name."""
        text = self.arrays_jsonl.read_bytes() if self.arrays_jsonl.is_file() else b""
        return {str(line["name"]): list(map(str, line["runs"])) for line in objects(text.splitlines())}

    def plan(self) -> PlanFile:
        """The plan that it runs.

        Raises:
            ConfigError: there is none.
        """
        if not self.plan_yaml.is_file():
            raise ConfigError(Problem("STUDY", self.path, "has no plan.yaml: it is not a submitted study."))
        return merged(read_plan(self.plan_yaml), [read_plan(path) for path in self.rounds()])

    def rounds(self) -> list[Path]:
        """Plans of the rounds that an adaptive study has added, the first first."""
        found: list[Path] = []
        while (path := self.path / f"round{len(found) + 1}.yaml").is_file():
            found.append(path)
        return found

    def next_round(self) -> Path:
        """Where the plan of the next one goes."""
        return self.path / f"round{len(self.rounds()) + 1}.yaml"

    def all_runs(self, plan: PlanFile) -> list[StudyRun]:
        """Stems, then cells, in the order of the plan."""
        content = plan.content
        cells = {str(cell["name"]): cell for cell in content["cells"]}
        members: dict[str, dict[str, Any]] = {}
        for cell in cells.values():
            if "stem" in cell:
                members.setdefault(str(cell["stem"]), cell)
        shared = [str(word) for word in content.get("overrides") or ()]
        found = [
            StudyRun(
                str(stem["name"]),
                STEM,
                int(stem["iterations"]),
                None,
                0,
                (*shared, *_model(plan, members[str(stem["name"])]), *_stem(stem, members[str(stem["name"])])),
                _shape(members[str(stem["name"])]),
            )
            for stem in content["stems"]
        ]
        for name, cell in cells.items():
            words = (*shared, *_model(plan, cell), *_cell(cell))
            stem = str(cell["stem"]) if "stem" in cell else None
            found.append(
                StudyRun(name, CELL, int(cell["iterations"]), stem, int(cell.get("from", 0)), words, _shape(cell))
            )
        return found

    def branching_point(self, run: StudyRun) -> tuple[int, Path] | None:
        """The checkpoint of its stem that a branch resumes from, and its iteration; None while there is none.

        A step whose numbers were not finite is not saved: then it is the next one, if it is near.
        """
        assert run.stem is not None
        last = run.begins + max(1, round(_NEAR * (run.iterations - run.begins)))
        found = committed(RunDirectory(self.runs / run.stem).checkpoints)
        return min((one for one in found if run.begins <= one[0] <= last), default=None)

    def overrides(self, run: StudyRun) -> list[str]:
        """All of a run's; of a branch those that depend on where its stem was saved too."""
        if run.stem is None:
            return list(run.overrides)
        planned = RunDirectory(self.runs / run.stem).checkpoints / f"iter_{run.begins:07d}"
        begins, path = self.branching_point(run) or (run.begins, planned)
        decay = run.iterations - begins
        return [*run.overrides, f"optim.lr_wsd_decay_iters={decay}", f"checkpoint.branch_from={path}"]


def _shape(cell: dict[str, Any]) -> str:
    return f"{cell['model']}_b{cell['sequences']}"


def _settings(cell: dict[str, Any]) -> list[str]:
    return [
        f"optim.learning_rate={cell['learning_rate']}",
        f"optim.min_learning_rate={cell['min_learning_rate']}",
        f"optim.lr_warmup_iters={cell['warmup']}",
        "optim.lr_decay_iters=null",
        "optim.lr_wsd_decay_iters=null",
        f"training.seed={cell['seed']}",
    ]


def _cell(cell: dict[str, Any]) -> list[str]:
    style = "wsd" if "stem" in cell else "cosine"
    length = [f"training.train_iters={cell['iterations']}", "checkpoint.keep_last=1"]
    return [*_settings(cell), *length, f"optim.lr_decay_style={style}"]


def _stem(stem: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    saves = ",".join(map(str, stem["save_at"]))
    constant = ["optim.lr_decay_style=constant", f"training.train_iters={stem['iterations']}"]
    return [*_settings(cell), *constant, f"checkpoint.save_at=[{saves}]", "checkpoint.keep_last=1"]


def _model(plan: PlanFile, cell: dict[str, Any]) -> list[str]:
    return [f"{name}={_text(value)}" for name, value in plan.model(cell)["overrides"].items()]


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    return str(value)
