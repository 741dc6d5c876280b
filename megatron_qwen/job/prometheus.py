"""Metrics in Prometheus' text format: those of a run, and plain numbers. The only file that knows prometheus_client."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from megatron_qwen.job.observation import RunObservation
from megatron_qwen.rundir import RunState


@dataclass(frozen=True)
class Number:
    """A number without labels.

    Args:
        name: of the metric, without the suffix of counters.
        meaning: one line.
        value: now.
        counts: whether it only grows.
    """

    name: str
    meaning: str
    value: float
    counts: bool = False


class _Numbers(Collector):
    def __init__(self, numbers: Sequence[Number]) -> None:
        self._numbers = numbers

    def collect(self) -> Iterable[Metric]:
        """The numbers."""
        for one in self._numbers:
            family = CounterMetricFamily if one.counts else GaugeMetricFamily
            yield family(one.name, one.meaning, value=one.value)


def page(numbers: Sequence[Number]) -> str:
    """The text format of some numbers."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Numbers(numbers))
    return generate_latest(registry).decode()


class RunMetrics(Collector):
    """Metrics of one run, looked up whenever they are asked for; docs/slurm.md lists them.

    Args:
        run: value of the label ``run``.
        look: at the run.
    """

    def __init__(self, run: str, look: Callable[[], RunObservation]) -> None:
        self._run, self._look = run, look
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """The text format, version 0.0.4, which node_exporter and Prometheus read."""
        return bytes(generate_latest(self._registry))

    def serve(self, port: int, address: str) -> None:
        """Answers requests in threads that end with this process.

        Raises:
            OSError: the port is taken, or the address is not of this machine.
        """
        start_http_server(port, address, self._registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry would look at the run to learn the names."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The metrics of a look."""
        seen = self._look()
        for name, meaning, value in (
            ("mq_iteration", "Last finished iteration.", seen.iteration),
            ("mq_loss", "Loss of the last step.", seen.loss),
            (
                "mq_tokens_per_second",
                "Of the last step, all ranks together, while the run runs.",
                seen.tokens_per_second,
            ),
            ("mq_last_step_timestamp_seconds", "When the last step ended, since 1970.", seen.stepped),
            ("mq_last_step_age_seconds", "Since the last step, while the run runs.", _age(seen, seen.stepped)),
            ("mq_heartbeat_timestamp_seconds", "When rank 0 last gave a sign of life, since 1970.", seen.alive),
            ("mq_goodput_ratio", "Useful time of steps divided by the time since the run began.", seen.goodput),
            ("mq_stragglers", "Ranks that their peers wait for, in the last step.", seen.stragglers),
            ("mq_excluded_nodes", "Nodes that the run avoids.", seen.excluded),
            ("mq_updated_timestamp_seconds", "When these metrics were written, since 1970.", seen.time),
        ):
            if value is not None:
                yield self._gauge(name, meaning, value)
        if seen.attempts is not None:
            yield self._restarts(seen.attempts)
        yield self._by("mq_run_state", "1 for the state the run is in.", "state", _states(seen))
        if seen.phase is not None:
            yield self._by("mq_phase", "1 for what the run is doing.", "phase", {seen.phase: 1.0})
        slow = GaugeMetricFamily(
            "mq_straggler_score", "Speed of a slow rank, as a share of its peers'.", labels=["run", "rank", "node"]
        )
        for one in seen.slow:
            slow.add_metric([self._run, str(one.rank), one.node], one.score)
        yield slow
        yield self._by("mq_time_seconds", "Where the time of the run went.", "kind", _kinds(seen))
        ends = CounterMetricFamily("mq_attempt_ends", "Attempts that have ended, by reason.", labels=["run", "reason"])
        for reason, count in sorted(seen.ends.items()):
            ends.add_metric([self._run, reason], count)
        yield ends

    def _gauge(self, name: str, meaning: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, meaning, labels=["run"])
        family.add_metric([self._run], value)
        return family

    def _restarts(self, attempts: int) -> Metric:
        family = CounterMetricFamily("mq_restarts", "Attempts after the first.", labels=["run"])
        family.add_metric([self._run], max(0, attempts - 1))
        return family

    def _by(self, name: str, meaning: str, label: str, values: dict[str, float]) -> Metric:
        family = GaugeMetricFamily(name, meaning, labels=["run", label])
        for key, value in sorted(values.items()):
            family.add_metric([self._run, key], value)
        return family


def _age(seen: RunObservation, moment: float | None) -> float | None:
    """None of a run that does not run: its last step may be weeks ago, and nobody has to look."""
    return max(0.0, seen.time - moment) if seen.runs and moment is not None else None


def _states(seen: RunObservation) -> dict[str, float]:
    return {str(state): float(state is seen.state) for state in RunState}


def _kinds(seen: RunObservation) -> dict[str, float]:
    return {name.removesuffix("_s"): seconds for name, seconds in seen.seconds.items()}
