"""An FP8 GEMM in a process of its own, for `mq doctor` and `mq setup`: what crashes or hangs there ends only that."""

import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_ROOT = Path(__file__).resolve().parent.parent
_MODULE = "megatron_qwen.models.fp8_check"
# The import of torch and Transformer Engine from a cold network file system, and the first kernels.
_TIMEOUT_S = 300.0
_AGAIN = "./mq setup --gpu installs what belongs to this driver"


@dataclass(frozen=True)
class Proof:
    """What the check found.

    Args:
        state: ok; wrong; or "not tried" where the GPU has no FP8.
        found: what was computed, with its error, or what went wrong.
        fix: what to do; empty where there is nothing to do.
    """

    state: Literal["ok", "wrong", "not tried"]
    found: str
    fix: str = ""


def prove(python: str, *, timeout_s: float = _TIMEOUT_S) -> Proof:
    """Runs the check on the first GPU that is visible.

    Args:
        python: interpreter of the environment to be tried.
        timeout_s: seconds after which the check is killed.
    """
    paths = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            [python, "-P", "-m", _MODULE],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**os.environ, "PYTHONPATH": paths},
            check=False,
        )
    except subprocess.TimeoutExpired:
        fix = "look at the GPU (nvidia-smi, dmesg: Xid) and at the file system of the environment."
        return Proof("wrong", f"no answer in {timeout_s:g} s", fix)
    except OSError as error:
        return Proof("wrong", f"{python}: {error.strerror}", f"{_AGAIN}.")
    if done.returncode == 0:
        try:
            return Proof(**json.loads(done.stdout.splitlines()[-1]))
        except (ValueError, TypeError, IndexError):
            return Proof("wrong", f"no result in {done.stdout[-200:]!r}", f"{_AGAIN}.")
    last = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return Proof("wrong", f"the process was ended by {name}: {last}", way_out(done.stderr))
    return Proof("wrong", last, way_out(done.stderr))


def way_out(said: str) -> str:
    """What to do about the message with which the check ended."""
    text = said.lower()
    if "undefined symbol" in text:
        return f"Transformer Engine was compiled for another torch: {_AGAIN}."
    if "no kernel image" in text:
        return f"torch has no code for this GPU: {_AGAIN}."
    if "driver version is insufficient" in text or "driver on your system is too old" in text:
        return f"torch's CUDA is newer than the driver: {_AGAIN}."
    if "cudnn" in text:
        return "another cuDNN is found before torch's: docs/performance.md, 'A GPU node without a network'."
    if "no module named" in text or "meta package" in text:  # Transformer Engine's word for a missing core
        return f"the environment is incomplete: {_AGAIN}."
    return f"{_AGAIN}; otherwise report this message."
