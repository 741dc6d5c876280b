"""The progress line says the numbers of the record, each with its unit."""

import io

from megatron_qwen.metrics.console import ProgressLine, duration

RECORD = {
    "iteration": 40,
    "lm_loss": 2.34567,
    "grad_norm": 1.2345,
    "learning_rate": 2.5e-4,
    "tokens_per_second": 123_456.7,
    "step_time_s": 10.0,
    "mfu": 0.4321,
    "skipped": False,
}


def test_a_line_by_hand():
    stream = io.StringIO()
    ProgressLine(stream).show(RECORD, last_iteration=100)
    expected = "step 40/100  loss 2.3457  grad 1.23  lr 2.50e-04  123,457 tokens/s  MFU 43.2%  10 min 00 s left\n"
    assert stream.getvalue() == expected


def test_what_is_left_goes_by_a_moving_mean_of_step_times():
    """Nine parts of the mean so far and one of the newest step: 10 s, then 0.9 x 10 + 0.1 x 20 = 11 s."""
    stream = io.StringIO()
    console = ProgressLine(stream)
    console.show(RECORD, last_iteration=100)
    console.show({**RECORD, "iteration": 41, "step_time_s": 20.0}, last_iteration=100)
    console.show({**RECORD, "iteration": 100, "validation_loss": 2.0}, last_iteration=100)
    lines = stream.getvalue().splitlines()
    assert lines[1].endswith("10 min 49 s left")  # 59 steps of 11 s
    assert lines[2].endswith("0 s left  | validation loss 2.0000")


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 59.4, 59.6, 3599.6, 3661, 90_000)] == [
        "0 s", "59 s", "1 min 00 s", "1 h 00 min", "1 h 01 min", "25 h 00 min",
    ]  # fmt: skip
