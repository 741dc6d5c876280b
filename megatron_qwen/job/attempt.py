"""One attempt at a run, as its controller makes it: health check, ranks, and how it ended."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_qwen.config.run import RunConfig
from megatron_qwen.job import counters, health, stacks
from megatron_qwen.job.allocation import Ending, JobAllocation
from megatron_qwen.job.first_failure import first_failure, nodes_to_blame, of_a_hang, words_of
from megatron_qwen.job.ranks import Ranks
from megatron_qwen.job.records import AttemptRecords
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.job.verdict import AttemptVerdict, Evidence, is_told, judge
from megatron_qwen.resilience import dump_watch
from megatron_qwen.resilience.evidence import FailureEvidence, Sign
from megatron_qwen.resilience.heartbeat import Watchdog, read_beat
from megatron_qwen.resilience.phase_timeouts import PhaseTimeouts
from megatron_qwen.resilience.policy import AttemptOutcome
from megatron_qwen.resilience.rank_end import read_rank_ends
from megatron_qwen.resilience.rules import Reason
from megatron_qwen.resilience.signals import StopSignals
from megatron_qwen.resilience.storage import fault_in, is_fault
from megatron_qwen.resilience.straggler_leave import read_slow_nodes
from megatron_qwen.rundir import RunDirectory, RunState

log = logging.getLogger(__name__)
# Ranks are polled twice a second: a poll is one system call. Looking for a newer attempt and for a hang reads files of
# a shared file system, and nothing depends on those seconds.
_POLL_S = 0.5
_CURRENT_EVERY_S = 5.0
# Slurm notices a dead node later than its peers do.
_NODE_STATE_WAIT_S = 3.0
# Slurm sends SIGKILL KillWait seconds after SIGTERM, 30 by default. This leaves the rest of them for killing the ranks
# and for scontrol requeue. Chosen by hand; the cluster of tests/slurm has KillWait=15.
LEAVE_S = 12.0


class ControllerSuperseded(Exception):
    """A newer attempt at the run has started elsewhere; this controller must not write to the run any more."""


class AttemptMaking:
    """Makes attempts on the nodes of a job.

    Args:
        directory: of the run.
        config: of the run.
        settings: of the job (job.json).
        allocation: the nodes, and the scheduler that gave them.
        records: of the attempts.
        signals: stop signals that this process has received.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: RunConfig,
        *,
        settings: JobSettings,
        allocation: JobAllocation,
        records: AttemptRecords,
        signals: StopSignals,
    ) -> None:
        self.directory, self.config, self.settings = directory, config, settings
        self.allocation, self.records, self.signals = allocation, records, signals

    def make(self, number: int) -> AttemptOutcome:
        """Makes the attempt."""
        try:
            self.directory.write_status(RunState.RUNNING, attempt=number, job_id=self.allocation.job_id)
            logs = self.directory.logs(number)
            logs.mkdir(parents=True, exist_ok=True)
            dump_watch.request_file(logs).touch()
            log.info("attempt %d on %s, %d ranks", number, ", ".join(self.allocation.nodes), self.allocation.world_size)
            return self._unfit(number, logs) or self._with_ranks(number, logs)
        except OSError as error:
            if not is_fault(error, self.directory.path):
                raise
            return self.outcome(number, Reason.STORAGE, f"{error.strerror} in {self.directory.path}")

    def _unfit(self, number: int, logs: Path) -> AttemptOutcome | None:
        """The outcome of the attempt if no rank may be started on these nodes, else None."""
        try:
            sick = self._sick_nodes(logs)
        except health.HealthCheckError as error:
            return self.outcome(number, Reason.ERROR, str(error))
        if self.signals.received is not None:
            return self.outcome(number, Reason.REQUEUED, "a stop signal arrived before any rank had started")
        checked = (*self.allocation.nodes, *self.allocation.spare_nodes)
        everywhere = len(sick) == len(checked)
        if not everywhere and (idle := sorted(sick.keys() - set(self.allocation.nodes))):
            log.warning("spare nodes that fail the health check are not used: %s", _listed(sick, idle))
            self.allocation.set_aside(idle)
            sick = {node: why for node, why in sick.items() if node not in idle}
        if not sick:
            return None
        detail = _listed(sick, sorted(sick))
        if everywhere:
            # A check that fails on every node is no single node's fault.
            detail = f"the health check failed on every node: {detail}"
            if all(map(health.is_of_storage, sick.values())):
                return self.outcome(number, Reason.STORAGE, detail)
            if len(sick) > 1:
                return self.outcome(number, Reason.ERROR, detail)
        evidence = FailureEvidence(Sign.UNHEALTHY, node=min(sick))
        return self.outcome(number, Reason.UNHEALTHY_NODE, detail, failed_nodes=tuple(sorted(sick)), evidence=evidence)

    def _sick_nodes(self, logs: Path) -> dict[str, str]:
        if self.settings.health_check is None or self.settings.scheduler == "local":
            return {}
        script = self.directory.code / health.SCRIPT
        nodes = (*self.allocation.nodes, *self.allocation.spare_nodes)
        return health.failures(
            nodes,
            script=script,
            arguments=self.settings.health_check,
            logs=logs,
            environment=self.allocation.environment(0),
            step_nodes=self.allocation.step_nodes(nodes),
        )

    def _with_ranks(self, number: int, logs: Path) -> AttemptOutcome:
        ranks, begun = self.allocation.start(self.directory.path, attempt=number, logs=logs), time.monotonic()
        try:
            hang = self._watch(ranks, number)
            if hang is not None:
                return self._hung(ranks, number, logs, hang)
        finally:
            ranks.kill()
        return self._ended(ranks, number, logs, seconds=time.monotonic() - begun)

    def _watch(self, ranks: Ranks, number: int) -> str | None:
        """Waits until the ranks end (returns None) or hang (returns one line that describes the hang)."""
        resilience = self.config.resilience
        watchdog = Watchdog(
            lambda: read_beat(self.directory.heartbeat),
            attempt=number,
            timeouts=PhaseTimeouts(resilience.startup_timeout_s, resilience.hang_timeout_s),
            world_size=self.allocation.world_size,
        )
        next_look, passed_on = time.monotonic() + _CURRENT_EVERY_S, False
        prepared = not resilience.standby_ranks
        too_late = float("inf")
        while ranks.poll() is None:
            time.sleep(_POLL_S)
            if self.signals.received is not None and not passed_on:
                # Slurm signals the ranks too, but not in every case in which it signals this process. Ranks only take
                # note of a signal, so receiving it twice does no harm.
                ranks.send(self.signals.received)
                passed_on, too_late = True, time.monotonic() + LEAVE_S
            if time.monotonic() > too_late:
                too_late = float("inf")
                if self.allocation.ending() is Ending.TIMED_OUT:
                    # At the limit Slurm soon sends SIGKILL to the ranks and to this process, and would not requeue the
                    # job. Ending the ranks now leaves this process the time to requeue.
                    log.warning("the ranks did not exit within %.0f s of the time limit: killing them", LEAVE_S)
                    ranks.kill()
            if time.monotonic() > next_look:
                next_look = time.monotonic() + _CURRENT_EVERY_S
                if self.records.is_superseded(number):
                    raise ControllerSuperseded
                if (hang := watchdog.silence()) is not None:
                    return hang
                if not prepared and self._has_stepped(number):
                    self._prepare_next(number)
                    prepared = True
        return None

    def _has_stepped(self, number: int) -> bool:
        beat = read_beat(self.directory.heartbeat)
        return beat is not None and beat.attempt == number and beat.iteration > beat.resumed_at

    def _prepare_next(self, number: int) -> None:
        """Starts ranks that wait. They must not be what ends a run."""
        try:
            self.allocation.prepare(
                self.directory.path, attempt=number + 1, folder=self.directory.logs(number) / "standby"
            )
        except OSError as error:
            log.warning("no ranks are kept ready for a restart: %s", error)

    def _hung(self, ranks: Ranks, number: int, logs: Path, hang: str) -> AttemptOutcome:
        found = stacks.gather(ranks, logs)
        for line in (f"attempt {number} hangs: {hang}; all stacks are in {logs / 'stacks.txt'}", *found.summary):
            log.error("%s", line)
        places = ranks.nodes_of_ranks()
        blame = tuple(sorted({places[rank] for rank in found.odd}))
        # If more than half of the nodes differ from the rest, none can be blamed.
        blame = blame if len(blame) * 2 <= len(self.allocation.nodes) else ()
        odd = f"; differs from the others: {', '.join(f'rank {rank} on {places[rank]}' for rank in found.odd[:4])}"
        counted = self._counted_since(logs, Ending.NOTHING)
        evidence = of_a_hang(found.odd, places, counted, blamed=bool(blame))
        return self._failed(number, AttemptVerdict(Reason.HANG, hang + (odd if blame else ""), blame), evidence)

    def _ended(self, ranks: Ranks, number: int, logs: Path, *, seconds: float) -> AttemptOutcome:
        code = ranks.poll() or 0
        ends = read_rank_ends(logs)
        if code and self.settings.scheduler == "slurm" and not self._all_heard(ranks):
            time.sleep(_NODE_STATE_WAIT_S)
        evidence = Evidence(
            exit_code=code,
            tasks=ranks.ends(),
            ends=ends,
            nodes=ranks.nodes_of_ranks(),
            down_nodes=self._down_nodes(ranks) if code else (),
            ending=self.allocation.ending() if code else Ending.NOTHING,
            storage=fault_in(self.directory.path) if code else None,
            directory=str(self.directory.path),
            seconds_left=self.allocation.seconds_left() if code else None,
            signal_delay_s=self.settings.signal_delay_s,
            slow=read_slow_nodes(logs) if code else None,
        )
        verdict = judge(evidence)
        # A lost node would be waited for; a slow or a told rank has broken nothing.
        broken = verdict.reason in (Reason.ERROR, Reason.LOST_PEER)
        counted = self._counted_since(logs, evidence.ending) if broken else {}
        found = first_failure(evidence, verdict, said=words_of(logs, evidence), seconds=seconds, found=counted)
        return self._failed(number, verdict, found)

    def _failed(self, number: int, verdict: AttemptVerdict, found: FailureEvidence | None) -> AttemptOutcome:
        """The end by a verdict, with the evidence for it, which may name a node that the verdict could not."""
        if found is not None:
            log.warning("evidence: %s", found)
        counted = f" ({', '.join(found.found)})" if found is not None and found.found else ""
        return self.outcome(
            number,
            verdict.reason,
            verdict.detail + counted,
            failed_nodes=nodes_to_blame(verdict, found),
            error=verdict.error,
            evidence=found,
        )

    def _counted_since(self, logs: Path, ending: Ending) -> dict[str, tuple[str, ...]]:
        """What the nodes have counted since the health check of this attempt, by node."""
        before = counters.noted(logs / health.LOG)
        if not before or self.signals.received is not None or ending is not Ending.NOTHING:
            return {}
        script = self.directory.code / counters.SCRIPT
        nodes, environment = self.allocation.nodes, self.allocation.environment(0)
        after = counters.NodeCounters(nodes, script, environment, self.allocation.step_nodes(nodes)).read()
        return counters.added(before, after)

    def _all_heard(self, ranks: Ranks) -> bool:
        """Whether the end of every rank was reported, by its node, and Slurm began none of it: no node is lost then."""
        ends = ranks.ends()
        told = self.signals.received is not None or any(is_told(end.code) for end in ends[:1])
        return len(ends) == self.allocation.world_size and not told

    def _down_nodes(self, ranks: Ranks) -> tuple[str, ...]:
        """Nodes that Slurm reports down now, or that srun reported while the ranks ran: a node may be back already."""
        return tuple(sorted({*ranks.failed_nodes(), *self.allocation.lost_among(self.allocation.nodes)}))

    def outcome(
        self,
        number: int,
        reason: Reason,
        detail: str,
        *,
        failed_nodes: tuple[str, ...] = (),
        error: str | None = None,
        evidence: FailureEvidence | None = None,
    ) -> AttemptOutcome:
        """The end of an attempt, with what it has added."""
        beat = read_beat(self.directory.heartbeat)
        own = beat is not None and beat.attempt == number
        iteration = beat.iteration if own and beat is not None else None
        gained = max(0, beat.iteration - beat.resumed_at) if own and beat is not None else 0
        saved = self.records.newest_saved()
        nodes = len(self.allocation.nodes)
        return AttemptOutcome(reason, detail, failed_nodes, error, iteration, gained, saved, evidence, nodes)


def _listed(sick: Mapping[str, str], nodes: Sequence[str]) -> str:
    return "; ".join(f"{node}: {sick[node]}" for node in nodes)
