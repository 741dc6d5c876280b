"""``mq bench predictions``: predicted tokens/s against published and measured ones.

One calibration serves all that others have published, and one all that was measured here: the achieved fraction of peak
is a property of the software.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from megatron_qwen.estimate.calibration import fit_achieved
from megatron_qwen.estimate.hardware import hardware
from megatron_qwen.estimate.step_time import step_time
from tools.dev.benchmarks.published_steps import PublishedStep, measured_steps, published_steps
from tools.dev.benchmarks.rows import BenchmarkRow

WITHIN = 0.15  # required of every prediction; chosen by hand. docs/performance.md has the ratios


def predicted(step: PublishedStep, achieved: float = 1.0) -> float:
    """Tokens a second of one device."""
    assumptions = replace(step.assumptions, achieved=achieved)
    time = step_time(step.config, device=hardware(step.gpu), world_size=step.devices, assumptions=assumptions)
    return time.tokens / time.seconds / step.devices


def calibrate(steps: Sequence[PublishedStep]) -> float:
    """The achieved fraction of peak that makes the predictions right in the geometric mean."""
    return fit_achieved([(step.tokens_per_second, partial(predicted, step)) for step in steps])


def run(*, rounds: int) -> list[BenchmarkRow]:
    """A row for every step; ``ratio`` is predicted over published.

    Args:
        rounds: not used: nothing here is timed.
    """
    groups = (list(published_steps()), list(measured_steps()))
    known = [(step, achieved) for steps in groups for achieved in [calibrate(steps)] for step in steps]
    rows = []
    for step, achieved in known:
        ours = predicted(step, achieved)
        ratio = ours / step.tokens_per_second
        near = min(ratio, 1 / ratio)
        conditions = f"predicted / published {ratio:.3f}; {achieved:.3f} of the peak rates; {step.devices} x {step.gpu}"
        rows.append(
            BenchmarkRow(
                benchmark=f"predicted tokens/s, {step.name}",
                ours=ours,
                against=step.tokens_per_second,
                unit="tokens/s",
                peer=step.source,
                ratio=near,
                ratio_min=near,
                ratio_max=near,
                required=1 - WITHIN,
                conditions=conditions,
            )
        )
    return rows
