"""A live progress line on a terminal, plain lines elsewhere."""

import sys
from typing import Any, TextIO


def duration(seconds: float) -> str:
    """``1 h 05 min``, ``3 min 20 s``, ``45 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


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
        if self.live:
            self.stream.write(f"\r\x1b[2K{text}" + ("\n" if validation is not None else ""))
            self._open = validation is None
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    def close(self) -> None:
        """Ends the live line."""
        if self.live and self._open:
            self.stream.write("\n")
            self._open = False
