"""A live progress line on a terminal, plain lines elsewhere."""

import sys
from typing import Any, TextIO

_TASKS_SHOWN = 3
_FIRST = ("acc_norm", "acc", "gold_bits_per_byte", "bits_per_byte")


def duration(seconds: float) -> str:
    """``1 h 05 min``, ``3 min 20 s``, ``45 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _scores(record: dict[str, Any]) -> str:
    """The first tasks' scores: accuracy where there is one, else bits per byte of the right answer or the text."""
    by_task: dict[str, dict[str, float]] = {}
    for name, value in record.items():
        if name.startswith("eval/"):
            task, metric = name.removeprefix("eval/").split("/", 1)
            by_task.setdefault(task, {})[metric] = value
    shown = []
    for task, found in list(by_task.items())[:_TASKS_SHOWN]:
        metric = next((one for one in _FIRST if one in found), next(iter(found)))
        shown.append(f"{task} {metric} {found[metric]:.4f}")
    return ", ".join(shown) + (", ..." if len(by_task) > _TASKS_SHOWN else "")


class ProgressLine:
    """Shows the newest step.

    Args:
        stream: where to write. A terminal gets one line that is overwritten, anything else one line per step.
    """

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self.stream = stream
        self.live = stream.isatty()
        self._mean_step_s: float | None = None
        self._open = False

    def show(self, record: dict[str, Any], *, last_iteration: int) -> None:
        """Shows a record of metrics.jsonl."""
        step = record["step_time_s"]
        self._mean_step_s = step if self._mean_step_s is None else 0.9 * self._mean_step_s + 0.1 * step
        left = (last_iteration - record["iteration"]) * self._mean_step_s
        parts = [
            f"step {record['iteration']}/{last_iteration}",
            f"loss {record['lm_loss']:.4f}",
            f"grad {record['grad_norm']:.2f}",
            f"lr {record['learning_rate']:.2e}",
            f"{record['tokens_per_second']:,.0f} tokens/s",
        ]
        if record["mfu"] is not None:
            parts.append(f"MFU {record['mfu']:.1%}")
        if record["skipped"]:
            parts.append("SKIPPED (not finite)")
        parts.append(f"{duration(left)} left")
        text = "  ".join(parts)
        validation = record.get("validation_loss")
        if validation is not None:
            text += f"  | validation loss {validation:.4f}"
        if (seconds := record.get("evaluation_s")) is not None:
            text += f"  | {_scores(record)} ({seconds:.1f} s)"
        if self.live:
            keep = validation is not None or seconds is not None
            self.stream.write(f"\r\x1b[2K{text}" + ("\n" if keep else ""))
            self._open = not keep
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    def close(self) -> None:
        """Ends the live line."""
        if self.live and self._open:
            self.stream.write("\n")
            self._open = False
