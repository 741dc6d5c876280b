"""What a step of a job prints, in a limited time: one that takes longer is ended with its srun."""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# At SIGTERM srun ends its step. Killed at once it would leave the step behind, and the next restart inside the
# allocation would wait for that. Chosen by hand.
_END_S = 10.0


@dataclass(frozen=True)
class StepOutput:
    """What was printed.

    Args:
        stdout: until the end.
        stderr: the same.
        code: of srun; None if it was ended.
    """

    stdout: str
    stderr: str
    code: int | None


def output_of(command: Sequence[str], *, environment: Mapping[str, str], timeout_s: float) -> StepOutput:
    """Runs srun.

    Args:
        command: srun and its arguments.
        environment: of the step.
        timeout_s: after so many seconds the step is ended.

    Raises:
        OSError: there is no srun.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(environment))
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
        return StepOutput(_text(stdout), _text(stderr), process.returncode)
    except subprocess.TimeoutExpired:
        process.terminate()
    try:
        stdout, stderr = process.communicate(timeout=_END_S)
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.wait()
        stdout, stderr = error.stdout or b"", error.stderr or b""
    return StepOutput(_text(stdout), _text(stderr), None)


def _text(output: bytes) -> str:
    return output.decode(errors="replace")
