"""What a callback may hook into."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_qwen.training.trainer import StepRecord, Trainer


class Callback:
    """A feature of the loop; every rank calls every hook, in the order the callbacks are listed."""

    def before_training(self, trainer: "Trainer") -> None:
        """Once, after a checkpoint was loaded."""

    def after_step(self, trainer: "Trainer", record: "StepRecord") -> None:
        """After every step; may add to ``record.extra`` and may call ``trainer.stop``."""

    def after_training(self, trainer: "Trainer") -> None:
        """Once, after the last step, also when the run was asked to stop."""

    def on_numerics_error(self) -> None:
        """On all ranks together, when the run ends because its numbers are not finite."""

    def close(self) -> None:
        """Always, also after an error; must not use collectives."""
