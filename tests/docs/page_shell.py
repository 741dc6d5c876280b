"""Runs the shell blocks of a page in bash; the programs of ``mq`` are forked from the warm interpreter of the tests."""

import os
import re
import subprocess
import threading
from pathlib import Path

from tests.conftest import ROOT, command, environment

_PROGRAMS = dict(re.findall(r"^([a-z]+) +((?:launch|tools|checkpoints_convert)\S+) ", (ROOT / "mq").read_text(), re.M))
# Asks the test for a program, waits for it and ends as it ends. Bash, because it starts in a few milliseconds.
_MQ = """#!/bin/bash
here=$(dirname "$0")
exec 3>&1 4>&2 # 1 is another file while the words are written
mkfifo "$here/$$.code"
printf '%s\\0' "$@" >"$here/$$.words"
echo $$ >"$here/requests"
read -r -t 600 code <"$here/$$.code"
exit "$code"
"""


class PageShell:
    """A bash in which ``mq`` is the checkout's.

    Args:
        place: where the blocks run.
        own: an empty directory for what the shell needs.
    """

    def __init__(self, place: Path, own: Path) -> None:
        self._place, self._own = place, own
        (own / "mq").write_text(_MQ)
        (own / "mq").chmod(0o755)
        os.mkfifo(own / "requests")
        # Open for writing as well, so that it does not end with the first request.
        self._requests = os.fdopen(os.open(own / "requests", os.O_RDWR))
        threading.Thread(target=self._serve, daemon=True).start()

    def run(self, block: str, *, timeout_s: float = 300) -> str:
        """What a block prints, errors included; fails where a command of it fails or the time is over."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=self._place,
            env={**environment(), "PATH": f"{self._own}:{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}"
        return done.stdout

    def _serve(self) -> None:
        for line in self._requests:
            threading.Thread(target=self._answer, args=(line.strip(),), daemon=True).start()

    def _answer(self, asking: str) -> None:
        """Runs a program in the place of the process that asks for it, and tells it the exit code."""
        code = 1
        try:
            program, *words = (self._own / f"{asking}.words").read_text().split("\0")[:-1]
            process = Path("/proc", asking)
            with (process / "fd" / "3").open("ab") as output, (process / "fd" / "4").open("ab") as errors:
                done = subprocess.run(
                    command(_PROGRAMS[program], *words),
                    cwd=(process / "cwd").readlink(),
                    env=environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=errors,
                    check=False,
                )
            code = done.returncode & 0xFF
        finally:
            (self._own / f"{asking}.code").write_text(f"{code}\n")
