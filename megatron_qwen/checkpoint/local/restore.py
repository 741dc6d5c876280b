"""Finds the newest whole set of pieces on the nodes of a run, and brings each to its rank.

A piece is taken from the rank's own node, else from whichever node has it: its partner's, or the one that a rank was on
before. Every piece is compared with its hash before it counts, so a damaged one is replaced by its copy.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_qwen.checkpoint.local.exchange import transfer
from megatron_qwen.checkpoint.local.nodes import Nodes, is_private
from megatron_qwen.checkpoint.local.piece import PieceError, PieceName, is_whole, parse, read_bytes

log = logging.getLogger(__name__)
_Copies = dict[int, list[tuple[str, PieceName]]]  # of each rank's piece: nodes that have it, and its name there


@dataclass(frozen=True)
class RankState:
    """What a rank resumes from.

    Args:
        iteration: of the run.
        tensors: of this rank, by name.
        facts: what was saved with them.
        copies: pieces of any rank that came from another node.
    """

    iteration: int
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]
    copies: int


def find_newest(
    directory: Path,
    nodes: Nodes,
    *,
    layout: str,
    newer_than: int,
    refuse: Callable[[dict[str, torch.Tensor], dict[str, Any]], str | None],
) -> RankState | None:
    """The newest local checkpoint that all ranks can resume from. Called by all ranks together.

    Args:
        directory: of the run's pieces on this node.
        nodes: of the run now.
        layout: hash of how the state is divided over ranks.
        newer_than: the newest committed checkpoint; rank 0's word is taken.
        refuse: why this rank cannot use tensors and facts, None if it can.
    """
    sets, newer_than = _sets(directory, nodes, newer_than)
    for iteration, attempt, written_under, world in sorted(sets, reverse=True):
        if iteration <= newer_than:
            break
        copies = sets[iteration, attempt, written_under, world]
        why: str | None = None
        if (written_under, world) != (layout, len(nodes.of_rank)):
            why = "it was written under another layout"
        else:
            fetched = _fetch(directory, nodes, copies)
            if isinstance(fetched, str):
                why = fetched
            else:
                state, why = _usable(iteration, *fetched, refuse)
                if state is not None:
                    return state
        if dist.get_rank() == 0:
            log.warning("local checkpoint %d of attempt %d cannot be used: %s", iteration, attempt, why)
    return None


def _sets(directory: Path, nodes: Nodes, newer_than: int) -> tuple[dict[tuple[int, int, str, int], _Copies], int]:
    """All pieces on all nodes, by iteration, attempt, layout and world size; and the newest committed iteration.

    Pieces of different attempts never make a set: a rank of a superseded attempt may have run on.
    """
    rank = dist.get_rank()
    lists = nodes.ranks_of(nodes.of_rank[rank])[0] == rank  # one rank of each node
    names: list[str] = []
    if lists and is_private(directory):
        names = sorted(path.name for path in directory.iterdir() if PieceName.of(path.name))
    everyone: list[tuple[list[str], int]] = [([], 0)] * dist.get_world_size()
    dist.all_gather_object(everyone, (names, newer_than))
    sets: dict[tuple[int, int, str, int], _Copies] = {}
    for node, (found, _) in zip(nodes.of_rank, everyone, strict=True):
        for name in filter(None, map(PieceName.of, found)):
            key = (name.iteration, name.attempt, name.layout, name.world_size)
            sets.setdefault(key, {}).setdefault(name.rank, []).append((node, name))
    return sets, everyone[0][1]


def _fetch(directory: Path, nodes: Nodes, copies: _Copies) -> tuple[torch.Tensor, int] | str:
    """The bytes of this rank's piece and how many pieces came from other nodes, or why the set is not whole.

    Copies that turn out to be damaged are left out, and the others tried, until every rank has a good one.
    """
    mine: torch.Tensor | None = None
    done: set[int] = set()
    damaged: list[str] = []
    while True:
        plan = {rank: _nearest(copies.get(rank, []), nodes.of_rank[rank]) for rank in range(len(nodes.of_rank))}
        if missing := [rank for rank, source in plan.items() if source is None]:
            where = f"on no node of the run is there a good piece of rank{'s' * (len(missing) > 1)} "
            return where + ", ".join(map(str, missing[:8])) + "".join(f"; {text}" for text in damaged[:4])
        wrong: list[tuple[int, str]] = []
        for rank in sorted(plan.keys() - done):
            node, name = plan[rank] or ("", None)
            assert name is not None
            arrived, problem = _bring(directory, nodes, rank, node, name)
            mine = mine if arrived is None else arrived
            wrong += [(rank, problem)] if problem else []
        everyone: list[list[tuple[int, str]]] = [[] for _ in nodes.of_rank]
        dist.all_gather_object(everyone, wrong)
        failed = {rank: text for found in everyone for rank, text in found}
        for rank, text in failed.items():
            copies[rank] = [copy for copy in copies[rank] if copy != plan[rank]]
            damaged.append(text)
            if dist.get_rank() == 0:
                log.warning("a piece of rank %d is refused: %s", rank, text)
        done |= plan.keys() - failed.keys()
        if not failed:
            assert mine is not None
            return mine, sum(source is not None and source[0] != nodes.of_rank[rank] for rank, source in plan.items())


def _nearest(copies: list[tuple[str, PieceName]], node: str) -> tuple[str, PieceName] | None:
    """A copy on this node where there is one."""
    here = [copy for copy in copies if copy[0] == node]
    return next(iter([*here, *copies]), None)


def _bring(
    directory: Path, nodes: Nodes, rank: int, node: str, name: PieceName
) -> tuple[torch.Tensor | None, str | None]:
    """Brings one piece to its rank: its bytes, on that rank, and what is wrong with it, where that was noticed."""
    here, ranks = dist.get_rank(), nodes.ranks_of(node)
    sender = rank if rank in ranks else ranks[rank % len(ranks)]
    if here not in (sender, rank):
        return None, None
    content: torch.Tensor | None = None
    problem: str | None = None
    if here == sender:
        try:
            content = read_bytes(directory / str(name))
        except PieceError as error:
            problem = f"{error} on {node}"
    if sender == rank:
        return content, problem
    arrived = transfer(content, sender=sender, receiver=rank, purpose=f"piece/{name.iteration}/{name.attempt}/{rank}")
    if here == rank and arrived is not None and not is_whole(arrived, name):
        return None, f"{name} did not arrive from {node} as it was sent"
    return arrived, problem


def _usable(
    iteration: int,
    content: torch.Tensor,
    copies: int,
    refuse: Callable[[dict[str, torch.Tensor], dict[str, Any]], str | None],
) -> tuple[RankState | None, str | None]:
    """The state if every rank can use its own; else why not."""
    state = None
    try:
        tensors, facts = parse(content)
        why = refuse(tensors, facts)
        state = RankState(iteration, tensors, facts, copies)
    except PieceError as error:
        why = str(error)
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, why)
    worst = next((f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text), None)
    return (None, worst) if worst else (state, None)
