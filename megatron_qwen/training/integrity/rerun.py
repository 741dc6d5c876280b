"""Computes a suspicious step again before its update: a fault that passed, one that stays, or the data itself.

1. The step is repeated with the same batches and generator states. Another result means a fault of hardware: the
   first result was wrong (transient) if a third run gives the second's, else results keep changing (persistent).
2. The same result can still be wrong, if a device makes the same mistake every time. So every data-parallel rank
   computes the slice of the batch of the next one. A slice with another result has met a faulty rank, and each rank has
   computed two slices (``faulty_after_shift``).
3. Where all slices agree, the spike is in the data.

Megatron-LM's rerun machine repeats a step in the same way; to test for a fault that stays it has to save, exit and be
started on other GPUs.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from megatron_qwen import device
from megatron_qwen.checkpoint import generators
from megatron_qwen.data.loaders.batches import Batch, BatchRequest, micro_batches
from megatron_qwen.data.reading.samples import SampleSource
from megatron_qwen.errors import Problem, SilentCorruptionError
from megatron_qwen.resilience.replicas import faulty_after_shift
from megatron_qwen.resilience.spikes import SpikeScore
from megatron_qwen.training.components import TrainingComponents
from megatron_qwen.training.integrity.contribution import Contribution, ContributionProbe, odd_ranks, residue
from megatron_qwen.training.step import Compute, StepResult

log = logging.getLogger(__name__)
# On a GPU kernels with atomic additions round differently each time, and experts round differently where the tokens of
# two ranks come in another order. A spike is larger by far. Chosen by hand.
_TOLERANCE = 0.01
# Steps after a spike that the data explains during which only values that are not finite, or by far larger, are looked
# at: instability of training brings many spikes, and each costs three steps. So it is at most 0.75 % of the steps.
# Chosen by hand.
_QUIET_STEPS, _BY_FAR = 400, 10.0
_DATA = "data"


@dataclass(frozen=True)
class StepInputs:
    """What a step is computed from.

    Args:
        batches: of this rank.
        source: of all samples.
        request: of the global batch.
    """

    batches: Sequence[Batch]
    source: SampleSource
    request: BatchRequest


class Guard(Protocol):
    """Looks at every step between its gradients and its update."""

    @property
    def finding(self) -> Mapping[str, Any]:
        """What the last step was found to be, for its record; empty if it was not looked at."""

    def before_step(self, inputs: StepInputs) -> None:
        """Called before the forward pass."""

    def examine(self, first: StepResult, compute: Compute) -> StepResult:
        """Called with the gradients reduced; returns the result to continue with, whose gradients must be in place."""


class StepGuard:
    """Looks at every step between its gradients and its update.

    Args:
        components: of the run.
        require_sound: checks weights and optimizer state first; a changed weight explains a spike as well.
        before_rerun: called before the gradients are computed again.
    """

    def __init__(
        self,
        components: TrainingComponents,
        *,
        require_sound: Callable[[str], None] | None = None,
        before_rerun: Callable[[], None] = lambda: None,
    ) -> None:
        self._components, self._require_sound, self._before_rerun = components, require_sound, before_rerun
        self._settings = components.config.resilience
        self._scores = {name: SpikeScore(self._settings.spike_window) for name in ("loss", "gradient norm")}
        self._generators: dict[str, torch.Tensor] = {}
        self._buffers: list[torch.Tensor] = []
        self._quiet_until, self._explained, self._score = 0, 0.0, 0.0
        self.finding: dict[str, Any] = {}

    def recall(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Takes up the steps before a resume, from metrics.jsonl, so that it decides as it would have without one."""
        for record in records:
            if record.get("spike_cause") == _DATA:
                self._quiet_until = int(record["iteration"]) + _QUIET_STEPS
                self._explained = float(record["spike_score"])
            if not record["skipped"] and record["lm_loss"] is not None and record["grad_norm"] is not None:
                self._scores["loss"].add(record["lm_loss"])
                self._scores["gradient norm"].add(record["grad_norm"])

    @property
    def memory(self) -> int:
        """Steps before the present one on which a decision can depend."""
        return self._settings.spike_window + _QUIET_STEPS

    def before_step(self, inputs: StepInputs) -> None:
        """Notes what a step changes besides gradients: generator states, and buffers such as a router's bias."""
        self.finding = {}
        self._inputs: StepInputs = inputs
        self._generators = generators.capture()
        self._buffers = [buffer.detach().clone() for buffer in self._module_buffers()]

    def examine(self, first: StepResult, compute: Compute) -> StepResult:
        """Computes the step again if it is a spike or due for a check.

        Args:
            first: its result.
            compute: gradients of batches, on all ranks together.

        Returns:
            The result to continue with, whose gradients are in place.

        Raises:
            SilentCorruptionError: a rank makes mistakes that do not pass; on all ranks together.
        """
        iteration = self._components.progress.iteration + 1
        why = self._spike(first, iteration)
        interval = self._settings.rerun_interval
        if why is None and not (interval and iteration % interval == 0):
            return self._accepted(first)
        if self._require_sound is not None and why is not None:
            self._require_sound(f"in iteration {iteration}, {why}")
        left = residue(self._components)
        again, contribution = self._repeat(compute, self._inputs.batches)
        if self._same(first, again) and (why is not None or device.has_cuda() or self._agree(left)):
            if why is None:
                return self._accepted(again)
            return self._reproduced(iteration, why, compute, contribution, again)
        return self._changed(iteration, why or "at a check (resilience.rerun_interval)", compute, left, again)

    def _changed(
        self, iteration: int, why: str, compute: Compute, left: tuple[int, int], again: StepResult
    ) -> StepResult:
        """The first two runs differ: a third tells whether the fault has passed."""
        now = residue(self._components)
        suspects = odd_ranks(left, now, device=self._components.batch_slice.device)
        third, _ = self._repeat(compute, self._inputs.batches)
        if self._same(again, third) and (device.has_cuda() or self._agree(now)):
            self._report(iteration, why, "transient fault", suspects if not device.has_cuda() else ())
            return self._accepted(third)
        later = residue(self._components)
        suspects = odd_ranks(now, later, device=self._components.batch_slice.device)
        suspects = suspects if not device.has_cuda() else ()
        raise self._fault(iteration, why, "gives another result each time it is computed", suspects)

    def _reproduced(
        self, iteration: int, why: str, compute: Compute, contribution: Contribution, again: StepResult
    ) -> StepResult:
        """Both runs are equal: other ranks compute the same slices."""
        if self._components.batch_slice.dp_size > 1:
            faulty = self._faulty(compute, contribution)
            if faulty:
                raise self._fault(iteration, why, "gives another result on another rank", faulty)
            # The gradients in place are those of shifted slices: equal up to the order of their sum.
            again, _ = self._repeat(compute, self._inputs.batches)
        self._report(iteration, why, _DATA, ())
        self._quiet_until, self._explained = iteration + _QUIET_STEPS, self._score
        if self._settings.spike_action == "skip":
            return replace(again, skipped=True)
        return self._accepted(again)

    def _faulty(self, compute: Compute, own: Contribution) -> tuple[int, ...]:
        """Ranks whose slice and neighbour's slice both have other results elsewhere."""
        components, part = self._components, self._components.batch_slice
        shifted = replace(part, dp_rank=(part.dp_rank + 1) % part.dp_size)
        batches = [batch.to(part.device) for batch in micro_batches(self._inputs.source, shifted, self._inputs.request)]
        states: list[dict[str, torch.Tensor]] = [{} for _ in range(part.dp_size)]
        dist.all_gather_object(states, self._generators, group=components.groups.dp)
        _, other = self._repeat(compute, batches, states[shifted.dp_rank])
        place = components.groups.pp.rank(), components.groups.tp.rank(), part.cp_rank, part.dp_rank
        reports: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, (place, own, other))
        by_place = {place: (rank, own, other) for rank, (place, own, other) in enumerate(reports)}
        size = part.dp_size
        pairs: dict[tuple[int, ...], list[tuple[Contribution, Contribution]]] = {}
        for *where, _ in by_place:
            # Slice i: by rank i, and by rank i - 1 after the shift.
            pairs[tuple(where)] = [
                (by_place[*where, index][1], by_place[*where, (index - 1) % size][2]) for index in range(size)
            ]
        exact = not device.has_cuda() and components.config.parallel.expert_model_parallel_size == 1
        differs = [any(_differ(*each[index], exact=exact) for each in pairs.values()) for index in range(size)]
        dp_ranks = faulty_after_shift(differs)
        if len(dp_ranks) == size == 2:
            dp_ranks = _larger(list(pairs.values()), exact=exact)
        elif len(dp_ranks) * 2 > size:
            return ()  # most ranks are not faulty: the slices cannot be compared
        # Of a faulty data-parallel rank's tensor, pipeline and context-parallel ranks, those whose own results differ.
        return tuple(
            sorted(
                by_place[*where, dp_rank][0]
                for where, each in pairs.items()
                for dp_rank in dp_ranks
                if _differ(*each[dp_rank], exact=exact) and _differ(*each[(dp_rank + 1) % size], exact=exact)
            )
        )

    def _repeat(
        self, compute: Compute, batches: Sequence[Batch], states: dict[str, torch.Tensor] | None = None
    ) -> tuple[StepResult, Contribution]:
        self._before_rerun()
        generators.restore(states or self._generators)
        for buffer, noted in zip(self._module_buffers(), self._buffers, strict=True):
            buffer.data.copy_(noted)
        if self._components.config.model.is_moe:
            get_moe_metrics_tracker().clear()
        probe = ContributionProbe(self._components.model)
        with probe.armed():
            result = compute(batches)
        assert probe.taken is not None
        return result, probe.taken

    def _spike(self, result: StepResult, iteration: int) -> str | None:
        least = self._settings.spike_threshold
        if not least:
            return None
        if iteration <= self._quiet_until:
            least = max(least, _BY_FAR * self._explained)
        for name, value in (("loss", result.loss), ("gradient norm", result.grad_norm)):
            self._score = self._scores[name].score(value)
            if not math.isfinite(value):
                self._score = 0.0  # says nothing of those that are finite
                return f"whose {name} is {value}"
            if self._score > least:
                return f"whose {name} {value:.6g} is {self._score:.1f} robust standard deviations above the median"
        return None

    def _accepted(self, result: StepResult) -> StepResult:
        self._scores["loss"].add(result.loss)
        self._scores["gradient norm"].add(result.grad_norm)
        return result

    def _same(self, one: StepResult, other: StepResult) -> bool:
        return all(
            _close(a, b, tolerance=_TOLERANCE if device.has_cuda() else 0.0)
            for a, b in ((one.loss, other.loss), (one.grad_norm, other.grad_norm))
        )

    def _agree(self, left: tuple[int, int]) -> bool:
        """Whether every rank's gradients are the bits that they were."""
        return not odd_ranks(left, residue(self._components), device=self._components.batch_slice.device)

    def _module_buffers(self) -> list[torch.Tensor]:
        return [buffer for module in self._components.model.modules for buffer in module.buffers()]

    def _report(self, iteration: int, why: str, cause: str, suspects: tuple[int, ...]) -> None:
        self.finding = {"spike_cause": cause, "spike_ranks": list(suspects), "spike_score": self._score}
        if dist.get_rank() == 0:
            where = f" on rank {', '.join(map(str, suspects))}" if suspects else ""
            log.warning("iteration %d, %s, was computed again: the cause is %s%s", iteration, why, cause, where)

    def _fault(self, iteration: int, why: str, how: str, suspects: tuple[int, ...]) -> SilentCorruptionError:
        named = f"rank {', '.join(map(str, suspects))}" if suspects else "no rank can be named"
        fix = (
            f"in iteration {iteration}, {why}, the step {how}, so its hardware is at fault. The update was not made. "
            "Start the run again without this rank's node: it resumes from its last checkpoint."
        )
        return SilentCorruptionError(Problem(named, None, fix), suspects=suspects)


def _close(a: float, b: float, *, tolerance: float) -> bool:
    """Whether two results are the same but for their rounding: an overflow may give inf once and NaN the next time."""
    if not (math.isfinite(a) and math.isfinite(b)):
        alike = a == b or (a != a and b != b)
        return alike or (tolerance > 0 and math.isfinite(a) == math.isfinite(b))
    return abs(a - b) <= tolerance * max(abs(a), abs(b))


def _differ(one: Contribution, other: Contribution, *, exact: bool) -> bool:
    if exact:
        return one.hash != other.hash
    return not _close(one.square, other.square, tolerance=2 * _TOLERANCE)


def _larger(places: list[list[tuple[Contribution, Contribution]]], *, exact: bool) -> tuple[int, ...]:
    """Of two ranks, the one whose results are the larger ones (or not finite) for both slices; none if neither is.

    What led here is a spike, so the wrong result is the larger.
    """
    votes = {
        index if _size(own) > _size(shifted) else (index - 1) % 2
        for each in places
        for index, (own, shifted) in enumerate(each)
        if _differ(own, shifted, exact=exact)
    }
    return tuple(votes) if len(votes) == 1 else ()


def _size(contribution: Contribution) -> float:
    return contribution.square if math.isfinite(contribution.square) else math.inf
