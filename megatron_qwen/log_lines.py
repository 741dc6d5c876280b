"""The form of a log line, the same in all programs: local time with milliseconds and offset from UTC, then the text.

Local, because Slurm prints local times (squeue, scontrol, the lines of slurmstepd in a rank's log); with the offset,
because nodes of several zones, a reader elsewhere and the hour that comes twice a year must not mix up the order.
"""

import datetime
import logging


class LogFormatter(logging.Formatter):
    """``2026-11-30 05:54:27.123+01:00 text``; lines after the first of a message have no time."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """The time of a record."""
        return text_of(record.created)


def text_of(moment: float) -> str:
    """Seconds since 1970 as a log line has them."""
    return datetime.datetime.fromtimestamp(moment).astimezone().isoformat(sep=" ", timespec="milliseconds")
