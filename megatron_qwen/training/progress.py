"""How far a run has come: counters that a checkpoint stores next to weights, optimizer and generator states."""

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(kw_only=True)
class TrainingProgress:
    """Counters of a run.

    Args:
        iteration: optimizer steps taken or skipped.
        schedule_iteration: position in the learning-rate schedule; a skipped step does not move it.
        consumed_samples: data position, the index of the next sample.
        consumed_tokens: tokens trained on, without padding.
        skipped_iterations: steps skipped because the loss or the gradient norm was not finite.
        consecutive_skips: how many of the latest steps in a row were skipped.
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
