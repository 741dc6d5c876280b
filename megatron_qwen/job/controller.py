"""The controller of a job: makes attempts at the run and decides what follows each.

It runs in the batch script on the first node (without Slurm: as a process of its own), outside the ranks, so that it
survives a rank that hangs or dies. It keeps no state of its own between jobs: everything it needs is in the run
directory.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from megatron_qwen.attempts import Attempt, AttemptLog
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.source import resolve
from megatron_qwen.errors import EXIT_DO_NOT_REQUEUE, UserError
from megatron_qwen.job.alerts import Alerts, EndedAttempt
from megatron_qwen.job.allocation import Ending, JobAllocation
from megatron_qwen.job.attempt import LEAVE_S, AttemptMaking, ControllerSuperseded
from megatron_qwen.job.bad_nodes import BadNodes
from megatron_qwen.job.end_of_attempt import EndOfAttempt, state_after
from megatron_qwen.job.environment import EnvironmentChangedError, require_unchanged
from megatron_qwen.job.records import AttemptRecords
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.metrics.console import duration
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.resilience.policy import AttemptOutcome, Decision, decide, decide_unbegun, excluded_nodes
from megatron_qwen.resilience.restart import JobSituation, is_barren, why_requeue
from megatron_qwen.resilience.rules import RULES, Action, Reason
from megatron_qwen.resilience.signals import StopSignals
from megatron_qwen.resilience.storage import is_fault
from megatron_qwen.rundir import RunDirectory, RunState

log = logging.getLogger(__name__)
_POLL_S = 0.5


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
        self.records = AttemptRecords(directory, self.attempts, allocation)
        self.bad_nodes = BadNodes(directory, settings, self.attempts, allocation)
        self.alerts = Alerts(directory, settings, allocation)
        self._unbegun = 0
        self.config: RunConfig = resolve(str(directory.run_yaml), [], RECIPES)
        self.making = AttemptMaking(
            directory, self.config, settings=settings, allocation=allocation, records=self.records, signals=signals
        )

    def run(self) -> int:
        """Runs attempts until this job has nothing more to do.

        Returns:
            The job's exit code, from the table in ``resilience.rules``.
        """
        try:
            return self._run()
        except EnvironmentChangedError as error:
            return self._refused(error)
        finally:
            try:
                self.alerts.close()
            finally:
                self.allocation.close()  # asks Slurm, which may take a while

    def _run(self) -> int:
        while True:
            settled = self._settled()
            if settled is not None:
                return settled
            try:
                decision = self._attempt()
                if decision.action is Action.REQUEUE and self._cancelled_meanwhile():
                    return EXIT_DO_NOT_REQUEUE
                goes_on = self._follow(decision)
                self.records.write_late()
            except ControllerSuperseded:
                log.warning(
                    "a newer attempt at this run has started elsewhere: this controller stops and changes nothing"
                )
                return EXIT_DO_NOT_REQUEUE
            if not goes_on:
                return decision.exit_code

    def _refused(self, error: UserError) -> int:
        """Stops the run before an attempt, and has people told."""
        why = error.render()
        log.error("%s", why)
        self.directory.write_status(RunState.STOPPED, exit_code=EXIT_DO_NOT_REQUEUE, reason=why)
        outcome = AttemptOutcome(Reason.CONFIGURATION, why)
        decision = Decision(Action.STOP, why, EXIT_DO_NOT_REQUEUE, ())
        number = self.attempts.newest()
        self.alerts.tell(EndedAttempt(number, self.allocation.nodes, outcome, decision, RunState.STOPPED))
        return EXIT_DO_NOT_REQUEUE

    def _settled(self) -> int | None:
        """Exit code if the run needs no further attempt, else None."""
        state = self.directory.state()
        if state is RunState.DONE:
            log.info("the run is done already")
            return 0
        if state is RunState.STOPPED or self.directory.is_cancelled(self.allocation.job_id):
            log.error("the run is %s; to resume it: mq launch requeue %s", state, self.directory.path)
            return EXIT_DO_NOT_REQUEUE
        return None

    def _attempt(self) -> Decision:
        try:
            self.records.write_what_is_left()
            decision = self._close_unfinished()
            if decision is not None:
                return decision
            require_unchanged(self.directory.path, self.settings, stopped=lambda: self.signals.received is not None)
            earlier = self.attempts.since_forgiven()
            if self.settings.spares and (avoid := excluded_nodes(self.bad_nodes.still_counting(earlier))):
                self.allocation.regroup(avoid)  # too few others: with those there are, as without spare nodes
            number = self.attempts.begin(
                nodes=list(self.allocation.nodes),
                job_id=self.allocation.job_id,
                restarts=self.allocation.restarts,
                world_size=self.allocation.world_size,
            )
        except OSError as error:
            return self._not_begun(error)
        self._unbegun = 0
        outcome = self._unless_cancelled(number, self.making.make(number))
        told = self.signals.received is not None
        decision = self._inside(earlier, outcome, self._decide(earlier, outcome))
        if not told and decision.action is not Action.STOP:
            ended, outcome = outcome, self._unless_cancelled(number, outcome)  # Slurm may have been asked for a while
            decision = decision if outcome is ended else self._decide(earlier, outcome)
        self._note(number, outcome, decision, exit_code=decision.exit_code)
        return decision

    def _unless_cancelled(self, number: int, outcome: AttemptOutcome) -> AttemptOutcome:
        if RULES[outcome.reason].action is Action.REQUEUE and self._cancelled():
            return self.making.outcome(number, Reason.CANCELLED, "the job was cancelled")
        return outcome

    def _inside(self, earlier: Sequence[Attempt], outcome: AttemptOutcome, decision: Decision) -> Decision:
        """A requeue as a restart inside the allocation, on the nodes that are left, where that is possible."""
        if decision.action is not Action.REQUEUE or self.allocation.requeues_in_place:
            return decision
        stopping = self.signals.received is not None
        situation = JobSituation(
            enabled=self.config.resilience.restart_in_job,
            stopping=stopping,
            # Slurm may take a while to answer, and a job that has been told to stop has little time.
            seconds_left=None if stopping or not RULES[outcome.reason].in_job else self.allocation.seconds_left(),
            signal_delay_s=self.settings.signal_delay_s,
            barren_before=bool(earlier) and is_barren(earlier[-1].reason, earlier[-1].gained),
        )
        why = why_requeue(outcome, decision, situation) or self.allocation.regroup(decision.exclude)
        if why is None and self.signals.received is None:
            return replace(decision, action=Action.RESTART)
        log.info("not restarted inside the allocation: %s", why or "the job has been told to stop")
        return decision

    def _not_begun(self, error: OSError) -> Decision:
        """What follows where not even the beginning of an attempt can be written."""
        if not is_fault(error, self.directory.path):
            raise error
        self._unbegun += 1
        tries = self._unbegun if self.allocation.requeues_in_place else None
        decision = decide_unbegun(f"{error.strerror} in {self.directory.path}", tries=tries)
        log.error("no attempt can be begun: %s", decision.why)
        return decision

    def _decide(self, earlier: Sequence[Attempt], outcome: AttemptOutcome) -> Decision:
        limit = self.config.resilience.max_restarts_without_progress
        return decide(self.bad_nodes.still_counting(earlier), outcome, max_restarts_without_progress=limit)

    def _cancelled(self) -> bool:
        """Whether a person cancelled the run: a requeue would restart a cancelled job."""
        cancelled = self.directory.is_cancelled(self.allocation.job_id)
        return cancelled or self.allocation.ending() is Ending.CANCELLED

    def _cancelled_meanwhile(self) -> bool:
        """Whether a person cancelled the job since the end of the attempt was judged."""
        meanwhile = not self.allocation.requeues_in_place and self.directory.is_cancelled(self.allocation.job_id)
        if meanwhile:
            log.warning("the job was cancelled: it is not requeued")
        return meanwhile

    def _note(self, number: int, outcome: AttemptOutcome, decision: Decision, *, exit_code: int | None) -> None:
        if self.records.is_superseded(number):
            raise ControllerSuperseded
        stopped_here = self.settings.scheduler == "local" and self.signals.received is not None
        state = state_after(outcome, decision, stopped_here=stopped_here)
        self.records.note(EndOfAttempt.of(number, outcome, decision, exit_code=exit_code), state)
        self.bad_nodes.tell(number, outcome, decision)
        self._alert(number, outcome, decision, state, unrecorded=exit_code is None)

    def _alert(
        self, number: int, outcome: AttemptOutcome, decision: Decision, state: RunState, *, unrecorded: bool
    ) -> None:
        """Has people told. It must not be what ends a run."""
        try:
            attempts = self.attempts.since_forgiven()
        except OSError:
            attempts = []
        before = excluded_nodes(self.bad_nodes.still_counting([one for one in attempts if one.number < number]))
        nodes = next((attempt.nodes for attempt in attempts if attempt.number == number), self.allocation.nodes)
        self.alerts.tell(EndedAttempt(number, nodes, outcome, decision, state, before, unrecorded))

    def _follow(self, decision: Decision) -> bool:
        """Carries out the decision; returns True if this process makes the next attempt itself."""
        if decision.action is Action.STOP:
            last = self.records.last_good()
            kept = f"The last good checkpoint is {last}." if last else "No checkpoint was written."
            log.error("STOPPED: the run will not be restarted: %s. %s", decision.why, kept)
            log.error("Fix the cause, then run: mq launch requeue %s", self.directory.path)
            return False
        if decision.action is Action.NONE:
            log.info("%s", decision.why)
            return False
        if decision.action is Action.RESTART:
            log.warning("restarted inside the allocation on %s (%s)", ", ".join(self.allocation.nodes), decision.why)
            return True
        later = f" in {duration(decision.delay_s)}" if decision.delay_s else ""
        if self.allocation.requeues_in_place and self.signals.received is None:
            log.warning("starting another attempt%s (%s)", later, decision.why)
            self._wait(decision.delay_s)
            return True
        if not self.settings.requeue:
            log.warning("the next job of the chain resumes the run%s (%s)", later, decision.why)
            if not self._unbegun:
                self.bad_nodes.avoid(decision)
            self._wait(min(decision.delay_s, (self.allocation.seconds_left() or 0.0) - LEAVE_S))
            return False
        log.warning("requeued%s (%s)", later, decision.why)
        try:
            self.allocation.requeue(delay_s=decision.delay_s)
            if not self._unbegun:  # else nobody knows which nodes the run's failures speak against: these stay excluded
                self.bad_nodes.avoid(decision)
        except UserError as error:
            log.error(
                "%s The job could not be requeued and exits with code %d; resume it with: mq launch requeue %s",
                error.render(),
                decision.exit_code,
                self.directory.path,
            )
        return False

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.signals.received is None:
            time.sleep(_POLL_S)

    def _close_unfinished(self) -> Decision | None:
        """Records the end of an attempt whose controller could not do so, because it died with its node.

        Returns:
            What the table says about it, where that forbids an attempt on these nodes; else None.
        """
        attempts = self.attempts.read()
        if not attempts or attempts[-1].ended is not None:
            return None
        last = attempts[-1]
        kept = EndOfAttempt.from_text(self.allocation.kept(last.job_id))
        if kept is not None and kept.number == last.number:
            self.records.write(kept, None)  # it was decided already
            return None
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
        outcome = self.making.outcome(last.number, reason, detail, failed_nodes=down)
        if outcome.reason is Reason.REQUEUED and not outcome.gained:
            # A first node that dies is often back by now, and Slurm says nothing of it. Without steps that looks the
            # same every time, so it has to count.
            detail = "Slurm requeued the job after its first node or its controller was lost"
            outcome = replace(outcome, reason=Reason.LOST_PEER, detail=detail)
        log.warning("attempt %d ended without recording why: %s", last.number, detail)
        decision = self._decide(earlier, outcome)
        if self.settings.spares and decision.exclude:
            self.allocation.regroup(decision.exclude)
        self._note(last.number, outcome, decision, exit_code=None)
        leave = self.settings.requeue and not set(decision.exclude).isdisjoint(self.allocation.nodes)
        return decision if decision.action is Action.STOP or leave else None
