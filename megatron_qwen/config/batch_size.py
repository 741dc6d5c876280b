"""Batch ramp-up: the global batch size as a function of consumed samples."""

from megatron_qwen.config.sections import TrainingConfig


def global_batch_size(consumed_samples: int, training: TrainingConfig) -> int:
    """Sequences of the next step: grows in equal increments, each held for an equal number of samples."""
    if training.rampup_batch_size is None:
        return training.global_batch_size
    start, increment, samples = training.rampup_batch_size
    steps = (training.global_batch_size - start) // increment
    done = consumed_samples * (steps + 1) // samples if samples else steps
    return start + min(steps, done) * increment
