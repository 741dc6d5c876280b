"""The end of an attempt as it is recorded: in attempts.jsonl, or with the job where no file can be written."""

import base64
import json
import zlib
from dataclasses import dataclass
from typing import Any

from megatron_qwen.resilience.policy import AttemptOutcome, Decision
from megatron_qwen.resilience.rules import Action, Reason
from megatron_qwen.rundir import RunState

_MARK = "mq:"


@dataclass(frozen=True)
class EndOfAttempt:
    """How an attempt ended and what was decided.

    Args:
        number: of the attempt.
        facts: the line of attempts.jsonl.
        why: of the decision; one line for people.
        exit_code: of the job.
        exclude: nodes that the job avoids.
    """

    number: int
    facts: dict[str, Any]
    why: str
    exit_code: int
    exclude: tuple[str, ...]

    @classmethod
    def of(cls, number: int, outcome: AttemptOutcome, decision: Decision, *, exit_code: int | None) -> "EndOfAttempt":
        """From an outcome and what follows; ``exit_code`` is that of the attempt's own job, None if it is not known."""
        facts = {
            "exit_code": exit_code,
            "reason": str(outcome.reason),
            "detail": outcome.detail,
            "iteration": outcome.iteration,
            "iterations_gained": outcome.gained,
            "saved_iteration": outcome.saved,
            "failed_nodes": list(outcome.failed_nodes),
            "error": outcome.error,
            "action": str(decision.action),
            "evidence": None if outcome.evidence is None else outcome.evidence.as_dict(),
            "fault": None if decision.blame is None else str(decision.blame.fault),
            "exclude": list(decision.exclude),
        }
        return cls(number, facts, decision.why, decision.exit_code, decision.exclude)

    def as_text(self) -> str:
        """As one word of letters, digits, ``-`` and ``_``, for the comment of a job."""
        content = [self.number, self.facts, self.why, self.exit_code, list(self.exclude)]
        return _MARK + base64.urlsafe_b64encode(zlib.compress(json.dumps(content).encode())).decode().rstrip("=")

    @classmethod
    def from_text(cls, text: str) -> "EndOfAttempt | None":
        """What ``as_text`` wrote; None of any other comment."""
        if not text.startswith(_MARK):
            return None
        word = text.removeprefix(_MARK)
        try:
            number, facts, why, exit_code, exclude = json.loads(
                zlib.decompress(base64.urlsafe_b64decode(word + "=" * (-len(word) % 4)))
            )
            return cls(int(number), dict(facts), str(why), int(exit_code), tuple(exclude))
        except (ValueError, TypeError, zlib.error):
            return None


def state_after(outcome: AttemptOutcome, decision: Decision, *, stopped_here: bool) -> RunState:
    """The state of a run after an attempt.

    Args:
        outcome: of the attempt.
        decision: what follows.
        stopped_here: whether a person has stopped a controller that nothing starts again (without Slurm).
    """
    if decision.action is Action.STOP:
        return RunState.STOPPED
    if decision.action is Action.RESTART:
        return RunState.RUNNING
    if decision.action is Action.REQUEUE:
        return RunState.CANCELLED if stopped_here else RunState.REQUEUED
    return RunState.DONE if outcome.reason is Reason.FINISHED else RunState.CANCELLED
