"""Tasks of lm-evaluation-harness by name, with those of a directory beside its own."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from megatron_qwen.errors import ConfigError, Problem

# Attributes of the harness's tasks.
_NOT_DONE = {"UNSAFE_CODE": "runs code that models write", "MULTIMODAL": "asks about images or sound"}


def find_tasks(names: Sequence[str], directories: Sequence[Path]) -> tuple[TaskManager, list[str]]:
    """The tasks that names and patterns (``mmlu_*``) mean.

    The harness takes some ten seconds to read its own thousands of task files, so it only does where one is needed.

    Args:
        names: of tasks, groups or tags.
        directories: with task files (YAML) besides the harness's own.

    Raises:
        ConfigError: a name means none.
    """
    wrong = [Problem("--task-dir", path, "is not a directory.") for path in directories if not path.is_dir()]
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
            hint = f" Did you mean {', '.join(near)}?" if near else " Tasks of your own need --task-dir."
            wrong.append(Problem("--tasks", name, f"is no task of the harness.{hint}"))
        found += [task for task in matched if task not in found]
    if wrong:
        raise ConfigError(wrong)
    return manager, found


def load_tasks(manager: TaskManager, names: Sequence[str], *, shots: int | None) -> list[Any]:
    """Loads tasks and groups, with their data.

    Args:
        manager: of the names.
        names: of tasks, groups and tags.
        shots: examples that were asked for; None leaves that to each task.

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
            wrong.append(Problem("--tasks", name, f"{fix} It said: {told[0]}"))
            continue
        fixed = [task for task, one in loaded["tasks"].items() if shots and one.get_config("num_fewshot") == 0]
        if fixed:
            wrong.append(Problem("--shots", shots, f"cannot be given to {', '.join(fixed)}, which fixes 0 examples."))
        for kind, what in _NOT_DONE.items():
            if unfit := [task for task, one in loaded["tasks"].items() if getattr(one, kind, False)]:
                wrong.append(Problem("--tasks", ", ".join(unfit), f"{what}, which mq eval does not do; leave it out."))
        found += [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())
    if not wrong:
        try:
            manager.load(found)
        except ValueError as error:
            wrong.append(Problem("--tasks", ",".join(names), f"{error}; name each once."))
    if wrong:
        raise ConfigError(wrong)
    return found
