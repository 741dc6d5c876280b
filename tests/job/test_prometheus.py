"""The text format, read by the parser of the Prometheus client."""

from prometheus_client.parser import text_string_to_metric_families

from megatron_qwen.job.observation import RunObservation, SlowRank
from megatron_qwen.job.prometheus import RunMetrics
from megatron_qwen.rundir import RunState

SEEN = RunObservation(
    time=1000.0,
    state=RunState.RUNNING,
    iteration=20,
    loss=2.5,
    tokens_per_second=1e6,
    stepped=940.0,
    phase="saving",
    alive=990.0,
    attempts=3,
    ends={"hang": 1, "lost node": 1},
    excluded=1,
    stragglers=9,
    slow=(SlowRank(12, "n2", 0.6),),
    goodput=0.75,
    seconds={"steps_s": 30.0},
)


def values(seen: RunObservation) -> dict[tuple[str, str], float]:
    """Value by name and label."""
    found = {}
    for family in text_string_to_metric_families(RunMetrics("7b", lambda: seen).text().decode()):
        assert family.documentation
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("run") == "7b"
            found[sample.name, "".join(labels.values())] = sample.value
    return found


def test_a_run_that_runs():
    assert values(SEEN) == {
        ("mq_iteration", ""): 20,
        ("mq_loss", ""): 2.5,
        ("mq_tokens_per_second", ""): 1e6,
        ("mq_last_step_timestamp_seconds", ""): 940,
        ("mq_last_step_age_seconds", ""): 60,
        ("mq_heartbeat_timestamp_seconds", ""): 990,
        ("mq_goodput_ratio", ""): 0.75,
        ("mq_excluded_nodes", ""): 1,
        ("mq_stragglers", ""): 9,
        ("mq_straggler_score", "n212"): 0.6,
        ("mq_updated_timestamp_seconds", ""): 1000,
        ("mq_restarts_total", ""): 2,
        ("mq_phase", "saving"): 1,
        ("mq_time_seconds", "steps"): 30,
        ("mq_attempt_ends_total", "hang"): 1,
        ("mq_attempt_ends_total", "lost node"): 1,
        **{("mq_run_state", str(state)): float(state is RunState.RUNNING) for state in RunState},
    }


def test_a_run_that_is_over_is_not_late():
    found = values(RunObservation(time=9999.0, state=RunState.DONE, iteration=20, stepped=940.0, attempts=1))
    assert ("mq_last_step_age_seconds", "") not in found
    assert found["mq_run_state", "done"] == 1
    assert found["mq_run_state", "running"] == 0
    assert found["mq_restarts_total", ""] == 0


def test_what_is_not_known_is_left_out():
    found = values(RunObservation(time=5.0))
    assert {name for name, _ in found} == {"mq_updated_timestamp_seconds", "mq_run_state"}


def test_types():
    text = RunMetrics("7b", lambda: SEEN).text().decode()
    assert "# TYPE mq_restarts_total counter\n" in text
    assert "# TYPE mq_loss gauge\n" in text
    assert 'mq_run_state{run="7b",state="running"} 1.0\n' in text


def test_a_loss_that_is_no_number():
    assert 'mq_loss{run="7b"} NaN\n' in RunMetrics("7b", lambda: RunObservation(5.0, loss=float("nan"))).text().decode()
