"""environment.json: the packages with which a run was submitted. An attempt with other packages is refused.

A job uses the environment of the checkout, which somebody may upgrade while the run waits in the queue. The run would
continue with other kernels and other numerics, and nobody would know.
"""

import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_qwen.attempts import now
from megatron_qwen.errors import EXIT_CONFIG, Problem, UserError
from megatron_qwen.files import atomic_write_json
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.packages import PythonEnvironment, differences, installed

log = logging.getLogger(__name__)
NAME = "environment.json"
# pip takes packages out before it puts the new ones in. While `mq` installs (it leaves a mark), a difference may pass.
# Chosen by hand: a set-up from a slow index takes ten minutes.
_LOOK_EVERY_S, _PATIENCE_S, _PATIENCE_WITH_MQ_S = 5.0, 60.0, 900.0
_MARK_OF_MQ = ".installing"
_ASK_TIMEOUT_S = 120.0
_NAMED = 12
_IMAGE = "--container-image="


class EnvironmentChangedError(UserError):
    """The environment is not the one that the run was submitted with (exit 2; a job ends with 93)."""

    exit_code = EXIT_CONFIG
    kind = "environment changed"


def record(run_dir: Path, settings: JobSettings) -> None:
    """Writes environment.json: the packages of now.

    Args:
        run_dir: the run.
        settings: of its jobs; they name the interpreter. Inside a container it cannot be asked from here: then this
            is the controller's, and the image is the run's environment.
    """
    found = _present(settings, run_dir / "code")
    if found is not None:
        content = {"time": now(), **found.as_dict(), "image": _image(settings)}
        atomic_write_json(run_dir / NAME, content)


def changed(run_dir: Path, settings: JobSettings) -> list[str]:
    """What differs from environment.json, an entry a package; empty where there is no such file, or none to read."""
    try:
        content = json.loads((run_dir / NAME).read_text())
        before = PythonEnvironment.from_dict(content)
    except FileNotFoundError:
        return []
    except ValueError as error:
        log.warning("%s cannot be read, so the packages are not compared: %s", run_dir / NAME, error)
        return []
    image = _image(settings)
    found = []
    if content.get("image") is not None and image is not None and content["image"] != image:
        found.append("the container image is another file than at submission")
    if _in_container(settings):
        return found  # the ranks import the image's packages, not those of the interpreter that asks here
    present = _present(settings, run_dir / "code", recorded=before.packages)
    return found + (differences(before, present) if present is not None else [])


def require_unchanged(
    run_dir: Path, settings: JobSettings, *, stopped: Callable[[], bool] = lambda: False, wait: bool = True
) -> None:
    """Returns where the packages are those of the submission, also if they are again after a while, or once stopped.

    Args:
        run_dir: the run. One without environment.json, of an earlier version, gets it here.
        settings: of its jobs.
        stopped: whether to wait no longer: the job was told to end, and its next start looks again.
        wait: whether a difference may pass, because somebody is installing.

    Raises:
        EnvironmentChangedError: they are others.
        OSError: the file system with the run or with the packages fails.
    """
    if not (run_dir / NAME).is_file():
        record(run_dir, settings)
        return
    begun = time.monotonic()
    while found := changed(run_dir, settings):
        patience_s = _PATIENCE_WITH_MQ_S if _mq_installs(settings) else _PATIENCE_S
        if stopped():
            return
        if not wait or time.monotonic() - begun > patience_s:
            raise EnvironmentChangedError(_problem(run_dir, settings, found))
        log.warning("the packages are not those of the submission (%s); looking again", _shown(found))
        time.sleep(_LOOK_EVERY_S)


def _problem(run_dir: Path, settings: JobSettings, found: list[str]) -> Problem:
    way = f"mq launch requeue {shlex.quote(str(run_dir))} --new-code"
    fix = (
        f"has other packages than the run was submitted with ({run_dir / NAME}): {_shown(found)}. Restore them, or "
        f"have the run take the present packages and code: {way} (or the submit command with --new-code)."
    )
    return Problem("environment", settings.python, fix)


def _shown(found: list[str]) -> str:
    return ", ".join(found[:_NAMED]) + (f" and {len(found) - _NAMED} more" if len(found) > _NAMED else "")


def _in_container(settings: JobSettings) -> bool:
    return bool(settings.rank_prefix) or any(word.startswith(_IMAGE) for word in settings.srun_arguments)


def _present(settings: JobSettings, code: Path, *, recorded: Iterable[str] = ()) -> PythonEnvironment | None:
    """The packages of the ranks' interpreter; None where it does not answer."""
    if _in_container(settings) or Path(settings.python) == Path(sys.executable):
        return installed(also=recorded)
    command = [settings.python, "-P", "-m", "megatron_qwen.packages"]
    environment = {**os.environ, "PYTHONPATH": str(code)}
    try:
        done = subprocess.run(command, capture_output=True, timeout=_ASK_TIMEOUT_S, env=environment, check=True)
        return PythonEnvironment.from_dict(json.loads(done.stdout))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        log.warning("%s does not tell its packages, so they are not compared: %s", settings.python, error)
        return None


def _image(settings: JobSettings) -> list[object] | None:
    """Path, bytes and time of change of the container's image, where it is a file."""
    named = [word.removeprefix(_IMAGE) for word in settings.srun_arguments if word.startswith(_IMAGE)]
    named += settings.rank_prefix[-1:]
    for path in map(Path, named):
        if path.is_file():
            state = path.stat()
            return [str(path), state.st_size, state.st_mtime_ns]
    return None


def _mq_installs(settings: JobSettings) -> bool:
    return (Path(settings.python).parent.parent / _MARK_OF_MQ).exists()
