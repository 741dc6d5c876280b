"""How a run leaves a slow node: its ranks save and end, and the controller learns which node to avoid."""

import datetime
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.files import atomic_write_json
from megatron_qwen.resilience.rules import Reason
from megatron_qwen.resilience.stragglers import WindowScores

log = logging.getLogger(__name__)
# A restart costs minutes of all nodes. If the run is slow again so soon, the node was not the cause. Chosen by hand.
_HOURS_BETWEEN = 6.0
_FILE = "stragglers.json"


@dataclass(frozen=True)
class SlowNodes:
    """Why ranks ended an attempt: the nodes to avoid, and one line about the worst rank."""

    nodes: tuple[str, ...]
    detail: str


class StragglerLeave:
    """Decides on rank 0 whether an attempt ends because of stragglers.

    Args:
        attempts: of the run; an earlier end for this reason is a matter of hours.
        logs: directory of the attempt's logs, where the controller finds why it ended.
    """

    def __init__(self, attempts: AttemptLog, logs: Path) -> None:
        self.attempts, self.logs = attempts, logs
        self._told: frozenset[str] = frozenset()

    def wanted(self, found: WindowScores, *, nodes: int) -> bool:
        """Whether to end; if so, the reason has been written. A refusal is logged once for the same nodes.

        Args:
            found: the stragglers.
            nodes: how many nodes the ranks run on.
        """
        slow = [one for one in found.stragglers if one.cause != "data"]  # storage is shared by nodes
        blamed = tuple(dict.fromkeys(one.node for one in slow))
        if not blamed or frozenset(blamed) == self._told:
            return False
        self._told = frozenset(blamed)
        if why_not := self._why_not(blamed, nodes):
            log.warning("slow nodes are kept (%s): %s", ", ".join(blamed), why_not)
            return False
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            atomic_write_json(self.logs / _FILE, {"nodes": blamed, "detail": str(slow[0])})
        except OSError as error:
            log.warning("slow nodes are kept: %s could not be written: %s", self.logs / _FILE, error)
            return False
        log.warning("saving a checkpoint, then exiting to leave %s", ", ".join(blamed))
        return True

    def _why_not(self, blamed: Sequence[str], nodes: int) -> str | None:
        if nodes > 1 and 2 * len(blamed) > nodes:
            return "they are more than half of the nodes"
        since = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=_HOURS_BETWEEN)
        for attempt in self.attempts.read():
            if attempt.reason == Reason.STRAGGLER and attempt.ended and _moment(attempt.ended) > since:
                return f"an attempt ended for this reason less than {_HOURS_BETWEEN:g} hours ago"
        return None


def _moment(text: str) -> datetime.datetime:
    """A time of attempts.jsonl; one that cannot be read is taken for now, which only makes the run stay."""
    try:
        return datetime.datetime.fromisoformat(text)
    except ValueError:
        return datetime.datetime.now(datetime.UTC)


def can_leave(environ: Mapping[str, str]) -> bool:
    """Whether a scheduler could give the run another node."""
    return "SLURM_JOB_ID" in environ


def read_slow_nodes(logs: Path) -> SlowNodes | None:
    """What ``StragglerLeave`` wrote for an attempt, or None."""
    try:
        content = json.loads((logs / _FILE).read_text())
        return SlowNodes(tuple(map(str, content["nodes"])), str(content["detail"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
