"""performance.json: throughput, MFU and memory of a run, and where its time went.

The file has one entry per attempt, which only that attempt replaces, and the sums over all attempts.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_qwen.files import atomic_write_json


@dataclass(frozen=True)
class AttemptTime:
    """Where the wall time of one attempt went, in seconds of rank 0.

    Args:
        attempt: number, from 1.
        devices: ranks.
        started: seconds since 1970.
        resumed_at: iteration it resumed from.
        iteration: last finished iteration.
        wall_s: from ``started`` to when this was written.
        startup_s: until the first step: imports, process group, build, checkpoint load.
        steps_s: in steps, without skipped steps and without waits for data.
        skipped_s: in steps whose update was skipped.
        data_wait_s: waiting for batches.
        save_s: training stood still for a checkpoint.
        validation_s: measuring the validation loss.
        evaluation_s: scoring tasks; cards of older versions lack it.
    """

    attempt: int
    devices: int
    started: float
    resumed_at: int
    iteration: int
    wall_s: float
    startup_s: float
    steps_s: float
    skipped_s: float
    data_wait_s: float
    save_s: float
    validation_s: float
    evaluation_s: float = 0.0

    @property
    def other_s(self) -> float:
        """The rest: metrics, other callbacks, the end of the process."""
        training = self.startup_s + self.steps_s + self.skipped_s + self.data_wait_s
        return max(0.0, self.wall_s - training - self.save_s - self.validation_s - self.evaluation_s)


def goodput(attempts: Sequence[AttemptTime]) -> dict[str, float]:
    """Seconds of each kind over all attempts, and ``share``: useful step time divided by the sum of all kinds.

    Steps that a later attempt repeats count once. Example: attempt 1 runs iterations 0 to 250, attempt 2 resumes at
    200: a fifth of attempt 1's step time is ``steps_done_again_s``. Time between attempts (in the queue, or until a
    person acts) is lost, and so is what a killed attempt did after it last wrote its entry.
    """
    again = between = 0.0
    for number, before in enumerate(attempts[:-1]):
        done = before.iteration - before.resumed_at
        if done > 0:
            from_here = min(one.resumed_at for one in attempts[number + 1 :])
            again += before.steps_s * min(done, max(0, before.iteration - from_here)) / done
    for before, after in pairwise(attempts):
        between += max(0.0, after.started - before.started - before.wall_s)
    seconds = {
        "steps_s": sum(one.steps_s for one in attempts) - again,
        "steps_done_again_s": again,
        "steps_skipped_s": sum(one.skipped_s for one in attempts),
        "data_wait_s": sum(one.data_wait_s for one in attempts),
        "save_s": sum(one.save_s for one in attempts),
        "validation_s": sum(one.validation_s for one in attempts),
        "evaluation_s": sum(one.evaluation_s for one in attempts),
        "startup_s": sum(one.startup_s for one in attempts),
        "between_attempts_s": between,
        "other_s": sum(one.other_s for one in attempts),
    }
    whole = sum(seconds.values())
    return {"share": seconds["steps_s"] / whole if whole else 0.0, **seconds}


def read_attempts(path: Path) -> list[AttemptTime]:
    """The attempts of a card, in order; none where it is missing or unreadable."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["attempts"]
        return sorted((AttemptTime(**entry) for entry in entries), key=lambda one: one.attempt)
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write_card(path: Path, facts: dict[str, Any], attempts: Sequence[AttemptTime]) -> None:
    """Replaces the card.

    Args:
        path: performance.json.
        facts: measurements of the newest attempt.
        attempts: all of them.
    """
    content = {**facts, "goodput": goodput(attempts), "attempts": [asdict(one) for one in attempts]}
    atomic_write_json(path, content)
