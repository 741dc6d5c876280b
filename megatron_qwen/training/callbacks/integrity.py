"""Finds weights and optimizer state that changed without an update, and replicas that are not equal."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_qwen.errors import Problem, SilentCorruptionError
from megatron_qwen.resilience.replicas import disagreements
from megatron_qwen.training.callbacks.base import Callback, TrainerInterface
from megatron_qwen.training.components import TrainingComponents
from megatron_qwen.training.integrity.held_state import HeldHashes, HeldNow
from megatron_qwen.training.step_record import StepRecord

_BACK = "Nothing was saved since. Start the run again: it resumes from its last checkpoint, whose weights were checked"


@dataclass(frozen=True)
class _Replicas:
    """Which ranks hold equal weights.

    Args:
        dense: of every rank a number that the holders of the same weights share, that of the first of them.
        expert: the same of the experts' weights.
    """

    dense: torch.Tensor
    expert: torch.Tensor


@dataclass(frozen=True)
class _Reports:
    """What every rank says of its weights, by rank.

    Args:
        changed: how many tensors changed.
        dense: hash of the weights.
        expert: hash of the experts' weights.
    """

    changed: torch.Tensor
    dense: torch.Tensor
    expert: torch.Tensor

    def is_sound(self, replicas: _Replicas) -> bool:
        """Whether nothing changed and all replicas are equal; one number reaches the host."""
        odd = (self.changed != 0) | (self.dense != self.dense[replicas.dense])
        return not bool((odd | (self.expert != self.expert[replicas.expert])).any())


class Integrity(Callback):
    """Checks the state of all ranks right before an update reads it, and before it is saved.

    Args:
        components: of the run.
        interval: steps between checks.
        parts: of the optimizer state, of which a check covers one.
    """

    def __init__(self, components: TrainingComponents, *, interval: int, parts: int) -> None:
        self._interval = interval
        self._held = HeldHashes(components, parts=parts)
        self._replicas: _Replicas | None = None

    def before_training(self, trainer: TrainerInterface) -> None:
        """Notes what was loaded."""
        self._note(trainer.components)

    def before_optimizer_step(self, trainer: TrainerInterface) -> None:
        """Checks, if it is time.

        Raises:
            SilentCorruptionError: on all ranks together.
        """
        iteration = trainer.components.progress.iteration + 1
        if iteration % self._interval == 0:
            self.require_sound(trainer.components, when=f"in iteration {iteration}, before its update")
        self._held.forget()

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """Notes what the update has written.

        A skipped step has written nothing, so what was noted holds, and it may have been skipped because it does not.

        Raises:
            SilentCorruptionError: on all ranks together.
        """
        if record.result.skipped:
            self.require_sound(trainer.components, when=f"after iteration {record.iteration}, which was skipped")
        else:
            self._note(trainer.components)

    def before_save(self, components: TrainingComponents) -> None:
        """Checks what is to be saved; all parameters must have been gathered.

        Raises:
            SilentCorruptionError: on all ranks together.
        """
        self.require_sound(components, when=f"after iteration {components.progress.iteration}, before its save")

    def require_sound(self, components: TrainingComponents, *, when: str) -> None:
        """Compares the state with what was noted, and the weights with those of the other replicas.

        Raises:
            SilentCorruptionError: on all ranks together.
        """
        now = self._held.look()
        if self._replicas is None:
            self._replicas = _replicas(components)
        reports = _exchanged(now, components.batch_slice.device)
        if reports.is_sound(self._replicas):
            return
        if suspects := reports.changed.nonzero().flatten().tolist():
            names = [", ".join(now.changed[:3])]
            dist.broadcast_object_list(names, src=suspects[0])
            found = f"{names[0]} of rank {suspects[0]} changed since the last update wrote it. {_BACK}."
            raise SilentCorruptionError(Problem(_ranks(suspects), None, f"{when}: {found}"), suspects=suspects)
        unequal = [
            *disagreements(self._replicas.dense.tolist(), reports.dense.tolist()),
            *disagreements(self._replicas.expert.tolist(), reports.expert.tolist()),
        ]
        suspects = sorted({rank for one in unequal for rank in one.odd})
        holders = sorted({rank for one in unequal for rank in one.ranks})
        found = (
            f"the weights differ from those of the other replicas (ranks {', '.join(map(str, holders))}). {_BACK}."
            if suspects
            else f"replicas of the weights differ and none has a majority, so no rank can be named. {_BACK}."
        )
        raise SilentCorruptionError(Problem(_ranks(suspects or holders), None, f"{when}: {found}"), suspects=suspects)

    def _note(self, components: TrainingComponents) -> None:
        following = components.progress.iteration + 1
        if following % self._interval == 0:
            self._held.note(following // self._interval)


def _replicas(components: TrainingComponents) -> _Replicas:
    """Exchanged once: layouts do not change."""
    groups, device = components.groups, components.batch_slice.device
    places = [(groups.pp.rank(), groups.tp.rank(), 0), (groups.pp.rank(), groups.ep.rank(), groups.expt_tp.rank())]
    dense, expert = _all_ranks([number for place in places for number in place], device).view(-1, 2, 3).unbind(1)
    return _Replicas(*(torch.tensor(_first_of_group(one.tolist()), device=device) for one in (dense, expert)))


def _first_of_group(places: list[list[int]]) -> list[int]:
    """Of every rank the first with the same place."""
    first: dict[tuple[int, ...], int] = {}
    return [first.setdefault(tuple(place), rank) for rank, place in enumerate(places)]


def _exchanged(now: HeldNow, device: torch.device) -> _Reports:
    """One small message: replica groups overlap, and all ranks must agree."""
    return _Reports(*_all_ranks([len(now.changed), now.dense, now.expert], device).unbind(1))


def _all_ranks(own: list[int], device: torch.device) -> torch.Tensor:
    """The numbers of all ranks, [ranks, numbers]."""
    sent = torch.tensor(own, dtype=torch.int64, device=device)
    received = sent.new_empty(dist.get_world_size() * len(own))
    dist.all_gather_into_tensor(received, sent)
    return received.view(-1, len(own))


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
