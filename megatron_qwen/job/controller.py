"""The controller of a job: starts the ranks of an attempt, watches them, and decides what follows.

It runs in the batch script on the first node (without Slurm: as a process of its own), outside the ranks, so that it
survives a rank that hangs or dies. It keeps no state of its own between jobs: everything it needs is in the run
directory.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_qwen.attempts import Attempt, AttemptLog
from megatron_qwen.checkpoint.paths import committed
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.source import resolve
from megatron_qwen.errors import EXIT_DO_NOT_REQUEUE, UserError
from megatron_qwen.job import health, stacks
from megatron_qwen.job.allocation import Ending, JobAllocation
from megatron_qwen.job.ranks import Ranks
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.job.verdict import Evidence, judge
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.resilience.heartbeat import Watchdog, read_beat
from megatron_qwen.resilience.policy import RULES, Action, AttemptOutcome, Decision, Reason, decide
from megatron_qwen.resilience.rank_end import read_rank_ends
from megatron_qwen.resilience.signals import StopSignals
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
_LEAVE_S = 12.0


class ControllerSuperseded(Exception):
    """A newer attempt at the run has started elsewhere; this controller must not write to the run any more."""


class JobController:
    """Runs attempts at a run until the run ends or the job has to.

    Args:
        directory: the run directory.
        settings: of the job (job.json).
        allocation: the nodes, and the scheduler that gave them.
        signals: stop signals that this process has received.
    """

    def __init__(
        self, directory: RunDirectory, settings: JobSettings, allocation: JobAllocation, signals: StopSignals
    ) -> None:
        self.directory, self.settings, self.allocation, self.signals = directory, settings, allocation, signals
        self.attempts = AttemptLog(directory.attempts)
        self.config: RunConfig = resolve(str(directory.run_yaml), [], RECIPES)

    def run(self) -> int:
        """Runs attempts until this job has nothing more to do.

        Returns:
            The job's exit code, from the table in ``resilience.policy``.
        """
        while True:
            settled = self._settled()
            if settled is not None:
                return settled
            try:
                decision = self._attempt()
            except ControllerSuperseded:
                log.warning(
                    "a newer attempt at this run has started elsewhere: this controller stops and changes nothing"
                )
                return EXIT_DO_NOT_REQUEUE
            if not self._follow(decision):
                return decision.exit_code

    def _settled(self) -> int | None:
        """Exit code if the run needs no further attempt, else None."""
        state = self.directory.state()
        if state is RunState.DONE:
            log.info("the run is done already")
            return 0
        if state in (RunState.STOPPED, RunState.CANCELLED):
            log.error("the run is %s; to resume it: mq launch requeue %s", state, self.directory.path)
            return EXIT_DO_NOT_REQUEUE
        return None

    def _attempt(self) -> Decision:
        decision = self._close_unfinished()
        if decision is not None:
            return decision
        earlier = self.attempts.since_forgiven()
        number = self.attempts.begin(
            nodes=list(self.allocation.nodes),
            job_id=self.allocation.job_id,
            restarts=self.allocation.restarts,
            world_size=self.allocation.world_size,
        )
        self.directory.write_status(RunState.RUNNING, attempt=number, job_id=self.allocation.job_id)
        logs = self.directory.logs(number)
        logs.mkdir(parents=True, exist_ok=True)
        log.info("attempt %d on %s, %d ranks", number, ", ".join(self.allocation.nodes), self.allocation.world_size)
        outcome = self._unfit(number, logs) or self._with_ranks(number, logs)
        if RULES[outcome.reason].action is Action.REQUEUE and self._cancelled():
            outcome = self._outcome(number, Reason.CANCELLED, "the job was cancelled")
        decision = self._decide(earlier, outcome)
        self._note(number, outcome, decision, exit_code=decision.exit_code)
        return decision

    def _decide(self, earlier: Sequence[Attempt], outcome: AttemptOutcome) -> Decision:
        limit = self.config.resilience.max_restarts_without_progress
        return decide(earlier, outcome, max_restarts_without_progress=limit)

    def _cancelled(self) -> bool:
        """Whether a person cancelled the run: a requeue would restart a cancelled job."""
        return self.directory.state() is RunState.CANCELLED or self.allocation.ending() is Ending.CANCELLED

    def _unfit(self, number: int, logs: Path) -> AttemptOutcome | None:
        """The outcome of the attempt if no rank may be started on these nodes, else None."""
        try:
            sick = self._sick_nodes(logs)
        except health.HealthCheckError as error:
            return self._outcome(number, Reason.ERROR, str(error))
        if self.signals.received is not None:
            return self._outcome(number, Reason.REQUEUED, "a stop signal arrived before any rank had started")
        if not sick:
            return None
        detail = "; ".join(f"{node}: {why}" for node, why in sorted(sick.items()))
        if len(sick) == len(self.allocation.nodes) > 1:
            # A check that fails on every node (a full shared disk, for example) is no single node's fault.
            return self._outcome(number, Reason.ERROR, f"the health check failed on every node: {detail}")
        return self._outcome(number, Reason.UNHEALTHY_NODE, detail, failed_nodes=tuple(sorted(sick)))

    def _sick_nodes(self, logs: Path) -> dict[str, str]:
        if self.settings.health_check is None or self.settings.scheduler == "local":
            return {}
        script = self.directory.code / health.SCRIPT
        return health.failures(
            self.allocation.nodes,
            script=script,
            arguments=self.settings.health_check,
            logs=logs,
            environment=self.allocation.environment(0),
        )

    def _with_ranks(self, number: int, logs: Path) -> AttemptOutcome:
        ranks = self.allocation.start(self.directory.path, attempt=number, logs=logs)
        try:
            hang = self._watch(ranks, number)
            if hang is not None:
                return self._hung(ranks, number, logs, hang)
        finally:
            ranks.kill()
        return self._ended(ranks, number, logs)

    def _watch(self, ranks: Ranks, number: int) -> str | None:
        """Waits until the ranks end (returns None) or hang (returns one line that describes the hang)."""
        resilience = self.config.resilience
        watchdog = Watchdog(
            lambda: read_beat(self.directory.heartbeat),
            attempt=number,
            start_s=resilience.startup_timeout_s,
            step_s=resilience.hang_timeout_s,
        )
        next_look, passed_on = time.monotonic() + _CURRENT_EVERY_S, False
        too_late = float("inf")
        while ranks.poll() is None:
            time.sleep(_POLL_S)
            if self.signals.received is not None and not passed_on:
                # Slurm signals the ranks too, but not in every case in which it signals this process. Ranks only take
                # note of a signal, so receiving it twice does no harm.
                ranks.send(self.signals.received)
                passed_on, too_late = True, time.monotonic() + _LEAVE_S
            if time.monotonic() > too_late:
                too_late = float("inf")
                if self.allocation.ending() is Ending.TIMED_OUT:
                    # At the limit Slurm soon sends SIGKILL to the ranks and to this process, and would not requeue the
                    # job. Ending the ranks now leaves this process the time to requeue.
                    log.warning("the ranks did not exit within %.0f s of the time limit: killing them", _LEAVE_S)
                    ranks.kill()
            if time.monotonic() > next_look:
                next_look = time.monotonic() + _CURRENT_EVERY_S
                if self.attempts.newest() != number:
                    raise ControllerSuperseded
                if (hang := watchdog.silence()) is not None:
                    return hang
        return None

    def _hung(self, ranks: Ranks, number: int, logs: Path, hang: str) -> AttemptOutcome:
        found = stacks.gather(ranks, logs)
        for line in (f"attempt {number} hangs: {hang}; all stacks are in {logs / 'stacks.txt'}", *found.summary):
            log.error("%s", line)
        places = ranks.nodes_of_ranks()
        blame = tuple(sorted({places[rank] for rank in found.odd}))
        # If more than half of the nodes differ from the rest, none can be blamed.
        blame = blame if len(blame) * 2 <= len(self.allocation.nodes) else ()
        odd = f"; differs from the others: {', '.join(f'rank {rank} on {places[rank]}' for rank in found.odd[:4])}"
        return self._outcome(number, Reason.HANG, hang + (odd if blame else ""), failed_nodes=blame)

    def _ended(self, ranks: Ranks, number: int, logs: Path) -> AttemptOutcome:
        code = ranks.poll() or 0
        ends = read_rank_ends(logs)
        if code:
            time.sleep(_NODE_STATE_WAIT_S if self.settings.scheduler == "slurm" else 0.0)
        evidence = Evidence(
            exit_code=code,
            tasks=ranks.ends(),
            ends=ends,
            nodes=ranks.nodes_of_ranks(),
            down_nodes=self._down_nodes(ranks) if code else (),
            ending=self.allocation.ending() if code else Ending.NOTHING,
            seconds_left=self.allocation.seconds_left() if code else None,
            signal_delay_s=self.settings.signal_delay_s,
        )
        verdict = judge(evidence)
        return self._outcome(
            number, verdict.reason, verdict.detail, failed_nodes=verdict.failed_nodes, error=verdict.error
        )

    def _down_nodes(self, ranks: Ranks) -> tuple[str, ...]:
        """Nodes that Slurm reports down now, or that srun reported while the ranks ran: a node may be back already."""
        return tuple(sorted({*ranks.failed_nodes(), *self.allocation.lost_among(self.allocation.nodes)}))

    def _outcome(
        self, number: int, reason: Reason, detail: str, *, failed_nodes: tuple[str, ...] = (), error: str | None = None
    ) -> AttemptOutcome:
        beat = read_beat(self.directory.heartbeat)
        own = beat is not None and beat.attempt == number
        iteration = beat.iteration if own and beat is not None else None
        gained = max(0, beat.iteration - beat.resumed_at) if own and beat is not None else 0
        saved = self._newest_saved()
        return AttemptOutcome(reason, detail, failed_nodes, error, iteration, gained, saved)

    def _newest_saved(self) -> int:
        found = committed(self.directory.checkpoints)
        return found[0][0] if found else 0

    def _note(self, number: int, outcome: AttemptOutcome, decision: Decision, *, exit_code: int | None) -> None:
        if self.attempts.newest() != number:
            raise ControllerSuperseded
        facts = {
            "exit_code": exit_code,
            "reason": str(outcome.reason),
            "detail": outcome.detail,
            "iteration": outcome.iteration,
            "iterations_gained": outcome.gained,
            "saved_iteration": outcome.saved,
            "failed_nodes": list(outcome.failed_nodes),
            "error": outcome.error,
            "action": str(decision.action),
        }
        self.attempts.end(number, **facts)
        state = {
            Action.STOP: RunState.STOPPED,
            Action.REQUEUE: RunState.REQUEUED,
            Action.NONE: RunState.DONE if outcome.reason is Reason.FINISHED else RunState.CANCELLED,
        }[decision.action]
        if decision.action is Action.REQUEUE and self.settings.scheduler == "local" and self.signals.received:
            state = RunState.CANCELLED  # without Slurm nothing restarts a controller that a person stopped
        self.directory.write_status(
            state,
            attempt=number,
            job_id=self.allocation.job_id,
            exit_code=decision.exit_code,
            reason=f"{outcome.reason}: {decision.why}" if state is RunState.STOPPED else decision.why,
            iteration=outcome.iteration,
            checkpoint=self._last_good(),
            avoid=list(decision.exclude),
        )

    def _last_good(self) -> str | None:
        found = committed(self.directory.checkpoints)
        return str(found[0][1]) if found else None

    def _follow(self, decision: Decision) -> bool:
        """Carries out the decision; returns True if this process makes the next attempt itself."""
        if decision.action is Action.STOP:
            last = self._last_good()
            kept = f"The last good checkpoint is {last}." if last else "No checkpoint was written."
            log.error("STOPPED: the run will not be restarted: %s. %s", decision.why, kept)
            log.error("Fix the cause, then run: mq launch requeue %s", self.directory.path)
            return False
        if decision.action is Action.NONE:
            log.info("%s", decision.why)
            return False
        avoid = f"; excluded nodes: {', '.join(decision.exclude)}" if decision.exclude else ""
        if self.allocation.requeues_in_place and self.signals.received is None:
            log.warning("starting another attempt (%s)", decision.why)
            return True
        if not self.settings.requeue:
            log.warning("the next job of the chain resumes the run (%s)", decision.why)
            return False
        log.warning("requeued (%s)%s", decision.why, avoid)
        try:
            self.allocation.requeue(decision.exclude)
        except UserError as error:
            log.error(
                "%s The job could not be requeued and exits with code %d; resume it with: mq launch requeue %s",
                error.render(),
                decision.exit_code,
                self.directory.path,
            )
        return False

    def _close_unfinished(self) -> Decision | None:
        """Records the end of an attempt whose controller could not do so, because it died with its node.

        Returns:
            What the table says about it, where that forbids an attempt on these nodes; else None.
        """
        attempts = self.attempts.read()
        if not attempts or attempts[-1].ended is not None:
            return None
        last = attempts[-1]
        earlier = [attempt for attempt in self.attempts.since_forgiven() if attempt.number < last.number]
        down = self.allocation.lost_among(last.nodes) if last.nodes else ()
        again = last.job_id is not None and last.job_id == self.allocation.job_id
        if down:
            reason, detail = Reason.LOST_NODE, f"Slurm reports {', '.join(down)} down"
        elif again and last.restarts is not None and self.allocation.restarts > last.restarts:
            reason, detail = Reason.REQUEUED, "Slurm ended and requeued the job before a checkpoint was saved"
        elif last.job_id is None and not last.nodes:
            reason, detail = Reason.LOST_PEER, "mq train was killed"
        else:
            reason, detail = Reason.LOST_PEER, "the controller was killed"
        outcome = self._outcome(last.number, reason, detail, failed_nodes=down)
        if outcome.reason is Reason.REQUEUED and not outcome.gained:
            # A first node that dies is often back by now, and Slurm says nothing of it. Without steps that looks the
            # same every time, so it has to count.
            detail = "Slurm requeued the job after its first node or its controller was lost"
            outcome = replace(outcome, reason=Reason.LOST_PEER, detail=detail)
        log.warning("attempt %d ended without recording why: %s", last.number, detail)
        decision = self._decide(earlier, outcome)
        self._note(last.number, outcome, decision, exit_code=None)
        leave = self.settings.requeue and not set(decision.exclude).isdisjoint(self.allocation.nodes)
        return decision if decision.action is Action.STOP or leave else None
