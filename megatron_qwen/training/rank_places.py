"""Where every rank runs, and whether the ranks of a node have cores of their own."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class RankPlace:
    """Of one rank.

    Args:
        node: Slurm's name of the node, else the host name.
        stage: pipeline stage.
        crowded: whether the ranks that share its cores have more threads than there are cores. Such ranks wait for one
            another's cores, which is no fault of the node.
        sees_queue: whether such waits can be told from work.
    """

    node: str = ""
    stage: int = 0
    crowded: bool = False
    sees_queue: bool = True


def places_of_ranks(group: dist.ProcessGroup, *, stage: int, sees_queue: bool = True) -> list[RankPlace]:
    """The places of a group's ranks, by rank; called by all of them together.

    Args:
        group: the ranks.
        stage: of the calling rank.
        sees_queue: of the calling rank.
    """
    node = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    cores = tuple(sorted(os.sched_getaffinity(0)))
    here = (node, hash(cores), len(cores), torch.get_num_threads(), stage, sees_queue)
    everyone: list[tuple[str, int, int, int, int, bool]] = [here] * dist.get_world_size(group)
    dist.all_gather_object(everyone, here, group=group)
    threads: dict[tuple[str, int], int] = {}
    for name, same_cores, _, count, *_ in everyone:
        threads[name, same_cores] = threads.get((name, same_cores), 0) + count
    return [
        RankPlace(name, its_stage, crowded=threads[name, same_cores] > count, sees_queue=its_queue)
        for name, same_cores, count, _, its_stage, its_queue in everyone
    ]
