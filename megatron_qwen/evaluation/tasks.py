"""Tasks of lm-evaluation-harness by name, with those of a directory beside its own."""

import difflib
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lm_eval.tasks import TaskManager

from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.evaluation.code_answers import SANDBOXED
from megatron_qwen.evaluation.sandbox import unavailable

# Of tasks whose answers are programs: they are refused, run in the sandbox, or their own answers are scored alone.
CodeTasks = Literal["refused", "run", "scored"]

_SEED = 1234  # the harness's own: of examples, and of what a task draws when its data is read (GPQA's choices)


@dataclass(frozen=True)
class Names:
    """What asks for tasks is called, in messages: options of a command, or fields of a configuration.

    Args:
        tasks: of the tasks.
        directories: of what has task files.
        shots: of the number of examples.
    """

    tasks: str = "--tasks"
    directories: str = "--task-dir"
    shots: str = "--shots"


OPTIONS = Names()
FIELDS = Names("evaluation.tasks", "evaluation.task_dir", "evaluation.shots")


@dataclass(frozen=True)
class Prepared:
    """Tasks with their data.

    Args:
        manager: the harness's, which knows their names.
        tasks: and groups.
    """

    manager: TaskManager
    tasks: Sequence[Any]

    def loaded(self) -> dict[str, Any]:
        """``tasks`` and ``groups`` by name, as the harness takes them."""
        found: dict[str, Any] = self.manager.load(list(self.tasks))
        return found

    def by_name(self) -> dict[str, Any]:
        """The tasks alone, those of groups too."""
        found: dict[str, Any] = self.loaded()["tasks"]
        return found


def prepare(
    names: Sequence[str],
    directories: Sequence[Path],
    *,
    shots: int | None,
    code: CodeTasks = "refused",
    where: Names = OPTIONS,
) -> Prepared:
    """Finds tasks and loads their data; before a model is loaded, which takes longer.

    Args:
        names: of tasks and groups, or patterns.
        directories: with task files besides the harness's own.
        shots: examples in front of each document; None leaves that to each task.
        code: what becomes of tasks whose answers are programs.
        where: what asks for them.

    Raises:
        ConfigError: a task that there is not, or whose data cannot be read.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in ("lm_eval", "datasets", "evaluate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with random_states_kept():
        manager, found = find_tasks(names, directories, where=where)
        return Prepared(manager, load_tasks(manager, found, shots=shots, code=code, where=where))


@contextmanager
def random_states_kept() -> Iterator[None]:
    """What tasks draw is the same every time, and draws nothing from the generators of a run."""
    python, arrays = random.getstate(), np.random.get_state()
    random.seed(_SEED)
    np.random.seed(_SEED)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def find_tasks(
    names: Sequence[str], directories: Sequence[Path], *, where: Names = OPTIONS
) -> tuple[TaskManager, list[str]]:
    """The tasks that names and patterns (``mmlu_*``) mean.

    The harness takes some ten seconds to read its own thousands of task files, so it only does where one is needed.

    Args:
        names: of tasks, groups or tags.
        directories: with task files (YAML) besides the harness's own.
        where: what asks for them.

    Raises:
        ConfigError: a name means none.
    """
    wrong = [Problem(where.directories, path, "is not a directory.") for path in directories if not path.is_dir()]
    if wrong:
        raise ConfigError(wrong)
    paths = [str(path) for path in directories]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=paths)
    found: list[str] = []
    for name in names:
        matched = manager.match_tasks([name])
        if not matched:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f" Did you mean {', '.join(near)}?" if near else f" Tasks of your own need {where.directories}."
            wrong.append(Problem(where.tasks, name, f"is no task of the harness.{hint}"))
        found += [task for task in matched if task not in found]
    if wrong:
        raise ConfigError(wrong)
    return manager, found


def load_tasks(
    manager: TaskManager,
    names: Sequence[str],
    *,
    shots: int | None,
    code: CodeTasks = "refused",
    where: Names = OPTIONS,
) -> list[Any]:
    """Loads tasks and groups, with their data.

    Args:
        manager: of the names.
        names: of tasks, groups and tags.
        shots: examples that were asked for; None leaves that to each task.
        code: what becomes of tasks whose answers are programs.
        where: what asks for them.

    Raises:
        ConfigError: the data of a task cannot be read, a task is named twice, or it fixes its examples.
    """
    wrong, found = [], []
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # whatever a task's own code, or the library that reads its data, raises
            told = str(error).strip().splitlines() or [type(error).__name__]
            fix = "cannot be loaded. Its data must be on this machine where there is no network (docs/evaluate.md)."
            wrong.append(Problem(where.tasks, name, f"{fix} It said: {told[0]}"))
            continue
        fixed = [task for task, one in loaded["tasks"].items() if shots and one.get_config("num_fewshot") == 0]
        if fixed:
            wrong.append(Problem(where.shots, shots, f"cannot be given to {', '.join(fixed)}, which fixes 0 examples."))
        wrong += _not_done(loaded["tasks"], code, where)
        if not fixed and code != "scored":
            wrong += [problem for one in loaded["tasks"].values() for problem in _first_prompt(one, shots, where)]
        found += [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())
    if not wrong:
        try:
            manager.load(found)
        except ValueError as error:
            wrong.append(Problem(where.tasks, ",".join(names), f"{error}; name each once."))
    if wrong:
        raise ConfigError(wrong)
    return found


def _first_prompt(task: Any, shots: int | None, where: Names) -> Iterator[Problem]:
    """What is wrong with prompts and examples: it is so with the first document."""
    set_shots(task, shots)
    try:
        task.build_all_requests(limit=1)
    except Exception as error:  # whatever a task's own code raises
        told = str(error).strip().splitlines() or [type(error).__name__]
        yield Problem(where.tasks, task.task_name, f"cannot be asked. It said: {told[0]}")


def set_shots(task: Any, shots: int | None) -> None:
    """As the harness does before it evaluates; the seed is set again: every evaluation has the same examples.

    Args:
        task: of the harness.
        shots: examples that were asked for; None leaves that to the task.
    """
    stated = task.get_config("num_fewshot")
    if stated is None or (shots is not None and stated != 0):
        task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=_SEED)


def _not_done(tasks: Mapping[str, Any], code: CodeTasks, where: Names) -> Iterator[Problem]:
    """Tasks that ask for more than text."""
    programs = [name for name, one in tasks.items() if getattr(one, "UNSAFE_CODE", False)]
    ours = [name for name in programs if (tasks[name].config.metadata or {}).get(SANDBOXED)]
    if unfit := [name for name in programs if name not in ours]:
        fix = "runs programs that a model writes in this process; `mq eval fetch` writes tasks that use a sandbox."
        yield Problem(where.tasks, ", ".join(unfit), fix)
    if ours and code == "refused":
        yield Problem(
            where.tasks, ", ".join(ours), "runs programs that the model writes, in a sandbox: add --run-code."
        )
    if ours and code == "run" and (reason := unavailable()) is not None:
        yield Problem("--run-code", None, f"is not possible: {reason}.")
    if unfit := [name for name, one in tasks.items() if getattr(one, "MULTIMODAL", False)]:
        yield Problem(
            where.tasks, ", ".join(unfit), "asks about images or sound, which is not done here; leave it out."
        )
