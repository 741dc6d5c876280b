"""The nodes that a run avoids: those of its own failures, and those that other runs have found bad."""

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from megatron_qwen.attempts import Attempt, AttemptLog
from megatron_qwen.errors import UserError
from megatron_qwen.job.allocation import JobAllocation
from megatron_qwen.job.avoiding import Avoided
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.json_lines import objects
from megatron_qwen.resilience.policy import AttemptOutcome, Decision
from megatron_qwen.resilience.quarantine import CONTROLLER, Quarantine, QuarantineEvidence, moment_of, utc_now
from megatron_qwen.resilience.rules import Action
from megatron_qwen.rundir import RunDirectory, RunState

log = logging.getLogger(__name__)


class BadNodes:
    """What a controller knows of bad nodes, and tells other runs and Slurm.

    A file that cannot be read or written is logged: what follows an attempt never depends on it.

    Args:
        directory: of the run.
        settings: of the job.
        attempts: of the run.
        allocation: whose scheduler keeps the job from nodes.
    """

    def __init__(
        self, directory: RunDirectory, settings: JobSettings, attempts: AttemptLog, allocation: JobAllocation
    ) -> None:
        self._directory, self._attempts, self._allocation = directory, attempts, allocation
        self._hours = settings.quarantine_hours
        self._shared = None if settings.quarantine is None else Quarantine(Path(settings.quarantine))

    def still_counting(self, attempts: Sequence[Attempt]) -> list[Attempt]:
        """The attempts without what speaks no longer against a node: it is too long ago, or the node was set free.

        That a rank died is remembered, because a program may need days for the same fault.
        """
        lifted = self._lifted()
        oldest = utc_now() - timedelta(hours=self._hours) if self._hours else None
        return [_forgetting(attempt, lifted, oldest) for attempt in attempts]

    def _lifted(self) -> dict[str, str]:
        try:
            return self._shared.lifted() if self._shared is not None else {}
        except OSError as error:
            log.warning("the quarantine cannot be read (%s)", error)
            return {}

    def tell(self, number: int, outcome: AttemptOutcome, decision: Decision) -> None:
        """Tells other runs of the nodes that an attempt has added to those that are excluded, and of cleared ones."""
        if self._shared is None or decision.blame is None:
            return
        ends = () if outcome.evidence is None else outcome.evidence.ends
        try:
            for node in decision.exclude:
                if node in decision.blame.doubtful:
                    log.warning("%s is not told to other runs: each time the same rank failed there", node)
                elif node in outcome.failed_nodes or node in ends:
                    why = decision.blame.why or f"{outcome.reason}: {outcome.detail}"
                    evidence = self._evidence(node, number, outcome)
                    entry = self._shared.put(node, hours=self._hours, by=CONTROLLER, why=why, evidence=evidence)
                    log.warning("%s is in quarantine until %s (%s)", node, entry.until, why)
            known = {entry.node: entry for entry in self._shared.in_force()} if decision.blame.cleared else {}
            for node in decision.blame.cleared:
                entry_of = known.get(node)
                if entry_of is not None and entry_of.by == CONTROLLER and entry_of.runs == (str(self._directory.path),):
                    self._shared.lift(node)
                    log.warning("%s is no longer in quarantine: %s", node, decision.blame.why)
        except (OSError, ValueError) as error:
            log.warning("the quarantine cannot be written (%s)", error)

    def _evidence(self, node: str, number: int, outcome: AttemptOutcome) -> list[QuarantineEvidence]:
        run = str(self._directory.path)
        before = [
            QuarantineEvidence(run, one.number, str(one.reason), one.detail, str(one.ended))
            for one in self.still_counting(self._attempts.since_forgiven())
            if node in one.failed_nodes and one.number < number
        ]
        now = utc_now().isoformat(timespec="seconds")
        return [*before, QuarantineEvidence(run, number, str(outcome.reason), outcome.detail, now)]

    def wanted(self, decision: Decision) -> list[str]:
        """Nodes to avoid, the run's own first, then those of other runs, the best proven first."""
        shared: list[str] = []
        try:
            if self._shared is not None:
                for wrong in self._shared.read()[1]:
                    log.warning("%s", wrong)
                shared = [entry.node for entry in self._shared.in_force()]
        except OSError as error:
            log.warning("the quarantine cannot be read (%s)", error)
        return list(dict.fromkeys([*decision.exclude, *shared]))

    def avoid(self, decision: Decision) -> None:
        """Has Slurm keep the job's next start, or the next jobs of its chain, from bad nodes; notes what holds."""
        wanted, asked_before = self.wanted(decision), self._asked()
        self._note_asked(wanted, asked_before)
        avoided = Avoided()
        for job in self._jobs(decision):
            try:
                avoided = self._allocation.avoid(wanted, asked_before=asked_before, job_id=job)
            except UserError as error:
                log.error("%s", error.render())
                avoided = Avoided(others=tuple(wanted), why_not="; ".join(map(str, error.problems)))
            if told := str(avoided):
                log.warning("job %s: %s", job, told)
        self._note(avoided)

    def _jobs(self, decision: Decision) -> list[str]:
        """The job, if it was requeued; otherwise the jobs that follow it in its chain."""
        own = self._allocation.job_id
        chain = next((jobs for entry in self._submissions() if own in (jobs := _jobs_of(entry))), [])
        later = chain[chain.index(own) + 1 :] if own in chain else []
        return later or ([own] if own is not None and decision.action is Action.REQUEUE else [])

    def _submissions(self) -> list[dict[str, Any]]:
        try:
            lines = self._directory.jobs.read_bytes().splitlines() if self._directory.jobs.is_file() else []
        except OSError:
            return []
        return list(objects(lines))

    def _asked(self) -> set[str]:
        """Nodes that Slurm was asked to exclude before: others were excluded by a person, and stay so."""
        submitted = {str(node) for entry in self._submissions() for node in entry.get("exclude") or ()}
        try:
            asked = self._attempts.asked_to_exclude()
        except OSError:
            asked = set()
        return submitted | asked

    def _note_asked(self, wanted: Sequence[str], asked_before: Collection[str]) -> None:
        """Before Slurm is asked: a node that is in nobody's notes would be taken for a person's, and stay excluded."""
        try:
            if not set(asked_before).issuperset(wanted):
                self._attempts.note_excluded(wanted)
        except OSError as error:
            log.warning("the excluded nodes cannot be noted (%s)", error.strerror)

    def _noted(self) -> dict[str, Any]:
        try:
            content = json.loads(self._directory.status.read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _note(self, avoided: Avoided) -> None:
        """Adds what is in force to status.json, unless somebody else has written it meanwhile."""
        noted = self._noted()
        if noted.get("state") != RunState.REQUEUED or noted.get("job_id") != self._allocation.job_id:
            return
        facts = {name: value for name, value in noted.items() if name not in ("state", "time")}
        facts |= {"avoid": list(avoided.nodes)}
        if avoided.others:
            facts |= {"not_avoided": list(avoided.others), "why_not_avoided": avoided.why_not}
        try:
            self._directory.write_status(RunState.REQUEUED, **facts)
        except OSError as error:
            log.warning("the excluded nodes cannot be noted (%s)", error.strerror)


def _jobs_of(entry: dict[str, Any]) -> list[str]:
    jobs = entry.get("jobs")
    return list(map(str, jobs)) if isinstance(jobs, list) else []


def _forgetting(attempt: Attempt, lifted: dict[str, str], oldest: datetime | None) -> Attempt:
    try:
        ended = moment_of(str(attempt.ended or attempt.started))
    except ValueError:
        return attempt
    if oldest is not None and ended < oldest:
        return replace(attempt, failed_nodes=(), evidence=_without_ends(attempt))
    kept = tuple(node for node in attempt.failed_nodes if node not in lifted or moment_of(lifted[node]) < ended)
    free = any(node in lifted and ended <= moment_of(lifted[node]) for node in (attempt.evidence or {}).get("ends", ()))
    return replace(attempt, failed_nodes=kept, evidence=_without_ends(attempt) if free else attempt.evidence)


def _without_ends(attempt: Attempt) -> dict[str, Any] | None:
    return {name: value for name, value in (attempt.evidence or {}).items() if name != "ends"} or None
