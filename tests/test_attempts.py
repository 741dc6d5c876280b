"""attempts.jsonl: which attempts count, after kills and after a person has resumed the run."""

from megatron_qwen.attempts import AttemptLog


def test_only_attempts_after_a_person_resumed_the_run_count(tmp_path):
    log = AttemptLog(tmp_path / "attempts.jsonl")
    for _ in range(3):
        log.end(log.begin(), reason="error")
    assert [attempt.number for attempt in log.since_forgiven()] == [1, 2, 3]
    log.forgive()
    assert log.since_forgiven() == []
    log.begin()
    assert [attempt.number for attempt in log.since_forgiven()] == [4]
    assert [attempt.number for attempt in log.read()] == [1, 2, 3, 4], "nothing is deleted"


def test_a_line_that_was_cut_off_loses_no_other(tmp_path):
    log = AttemptLog(tmp_path / "attempts.jsonl")
    log.end(log.begin(), exit_code=75)
    with log.path.open("a") as file:
        file.write('{"attempt": 2, "sta')
    assert log.begin() == 2
    assert [(attempt.number, attempt.exit_code) for attempt in log.read()] == [(1, 75), (2, None)]
