"""How far a run has come: the state that a checkpoint carries beside weights, optimizer and generators."""

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(kw_only=True)
class TrainingProgress:
    """Counters of a run.

    Args:
        iteration: optimizer steps taken or skipped.
        schedule_iteration: position in the learning-rate schedule; a skipped step does not move it.
        consumed_samples: data position, the index of the next sample.
        consumed_tokens: tokens trained on.
        skipped_iterations: steps left out because loss or gradient was not finite.
        consecutive_skips: of those, the ones in a row up to now.
    """

    iteration: int = 0
    schedule_iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_iterations: int = 0
    consecutive_skips: int = 0

    def as_dict(self) -> dict[str, int]:
        """For a checkpoint's JSON."""
        return asdict(self)

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes the counters of a checkpoint."""
        for item in fields(self):
            setattr(self, item.name, int(saved[item.name]))
