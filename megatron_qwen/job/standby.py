"""Ranks of the next attempt that wait on the nodes of a job, as its controller sees them."""

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_qwen.job.ranks import SrunRanks
from megatron_qwen.resilience import standby

log = logging.getLogger(__name__)
STANDBY_STEP = "mq_standby"
_ANSWER_S, _POLL_S = 10.0, 0.05  # for a signal through slurmctld and its tree of nodes; chosen by hand


@dataclass(frozen=True)
class Standby:
    """A job step of ranks that wait.

    Args:
        ranks: of the step.
        name: of the step.
        nodes: that it is on.
        environment: with the attempt that it is for, and the rendezvous of that attempt.
        folder: of its output while it waits.
    """

    ranks: SrunRanks
    name: str
    nodes: tuple[str, ...]
    environment: Mapping[str, str]
    folder: Path

    def begin(self, nodes: tuple[str, ...], environment: Mapping[str, str], logs: Path) -> SrunRanks | None:
        """Has the ranks begin, or ends them.

        Args:
            nodes: of the attempt.
            environment: of the attempt. It differs from that of these ranks if the attempt is another, or if somebody
                has taken the port of the rendezvous meanwhile.
            logs: directory of the attempt's logs.

        Returns:
            The ranks; None if others have to be started.
        """
        if why := self._why_not(nodes, environment):
            log.info("the ranks that wait are not used: %s", why)
        else:
            self.ranks.send(standby.BEGIN)
            if self._has_begun():
                self.ranks.keep_log_in(logs)  # not before: the end of ranks that are given up is none of this attempt
                log.info("the ranks that waited begin")
                shutil.rmtree(self.folder, ignore_errors=True)  # one that the signal has not reached ends by that
                return self.ranks
            log.warning("the ranks that wait are not used: the signal that they wait for did not reach them")
        self.end()
        return None

    def _has_begun(self) -> bool:
        """Whether rank 0 answers in time. What scancel says is no answer: it may fail although the signal arrives."""
        deadline = time.monotonic() + _ANSWER_S
        while not standby.has_begun(self.folder):
            if self.ranks.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def _why_not(self, nodes: tuple[str, ...], environment: Mapping[str, str]) -> str | None:
        if nodes != self.nodes:
            return "the attempt is on other nodes"
        if environment != self.environment:
            return "the attempt has another environment"
        if (code := self.ranks.poll()) is not None:
            return f"they have ended, with {code}; their output is in {self.folder}"
        return None if standby.is_ready(self.folder) else "they are not ready"

    def end(self) -> None:
        """Ends the ranks. Their output is removed unless they had ended before, which it explains."""
        kept = self.ranks.poll() is not None
        self.ranks.kill()
        if not kept:
            shutil.rmtree(self.folder, ignore_errors=True)
