"""A log line has its time with the offset from UTC."""

import logging
import time

import pytest

from megatron_qwen.log_lines import LogFormatter, text_of


@pytest.fixture(params=["UTC", "America/New_York", "Asia/Kolkata"])
def zone(request, monkeypatch):
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


def test_a_line(zone):
    record = logging.LogRecord("name", logging.INFO, "file", 1, "step %d\nmore", (7,), None)
    record.created = 1_767_261_600.25  # 2026-01-01 10:00:00.25 UTC
    expected = {
        "UTC": "2026-01-01 10:00:00.250+00:00",
        "America/New_York": "2026-01-01 05:00:00.250-05:00",
        "Asia/Kolkata": "2026-01-01 15:30:00.250+05:30",
    }
    assert LogFormatter().format(record) == f"{expected[zone]} step 7\nmore"


def test_the_hour_that_comes_twice(monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        texts = [text_of(1_793_511_000.0 + hours * 3600) for hours in (0, 1)]
    finally:
        monkeypatch.undo()
        time.tzset()
    assert texts == ["2026-11-01 01:30:00.000-04:00", "2026-11-01 01:30:00.000-05:00"]
