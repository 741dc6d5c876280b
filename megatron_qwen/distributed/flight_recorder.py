"""The last collectives of this rank, from torch's flight recorder.

torch keeps them for gloo and for NCCL. It writes its own dumps, which are pickles, when NCCL times out; what a
controller reads is JSON that this file writes.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d

from megatron_qwen.files import atomic_write_json

# Of each group, the newest entries: enough to show where ranks part. A dump of the whole ring is a megabyte a rank.
_KEPT = 4
_RING = "2000"  # torch's default in 2.15
_FIELDS = ("collective_seq_id", "p2p_seq_id", "is_p2p", "profiling_name", "input_sizes", "output_sizes", "state")


def prepare(logs: Path, environ: MutableMapping[str, str] = os.environ) -> None:
    """Turns the recorder on, and has torch keep its own dumps with the logs; before the process group is made.

    Args:
        logs: of the attempt.
        environ: what a user has set there stays.
    """
    # torch 2.9 renamed the first two, and warns of the old names. A user may have set either.
    settings = (
        (("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), _RING),
        (("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"), str(logs / "torch_trace_rank_")),
        (("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1"),
    )
    for names, value in settings:
        if not any(name in environ for name in names):
            environ[names[0]] = value


def write(path: Path) -> None:
    """Writes the last collectives of every group of this rank, for ``job.collectives``."""
    atomic_write_json(path, {"groups": last_collectives()}, indent=None)


def last_collectives() -> list[dict[str, Any]]:
    """For each group of this rank: its name, its ranks, and its newest collectives, oldest first.

    ``done`` of a collective says whether it has ended on this rank. Groups that were destroyed are left out: what they
    left unfinished waits for nobody. An empty list: nothing was recorded.
    """
    entries: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    descriptions: dict[str, str] = {}
    # The second is NCCL's recorder. Which of them this build and this version of torch have differs.
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        dump = getattr(_distributed_c10d, name, None)
        for entry in json.loads(dump()).get("entries", ()) if dump is not None else ():
            group, descriptions[entry["process_group"][0]] = entry["process_group"]
            entries[group].append(entry)
    ranks = _ranks_of_groups()
    return [
        {
            "name": group,
            "description": descriptions[group],
            "ranks": ranks[group],
            "collectives": [
                {**{field: entry.get(field) for field in _FIELDS}, "done": is_done(entry)} for entry in found[-_KEPT:]
            ],
        }
        for group, found in entries.items()
        if group in ranks
    ]


def is_done(entry: Mapping[str, Any]) -> bool:
    """Whether a collective has ended. gloo does not set its state, only that nobody waits for it any more."""
    return bool(entry.get("retired")) or entry.get("state") == "completed"


def _ranks_of_groups() -> dict[str, list[int]]:
    """Ranks of every group of this process, by its name. In the recorder's own list gloo's groups share one name."""
    world = dist.distributed_c10d._world
    return {name: sorted(world.pg_group_ranks[group]) for group, name in world.pg_names.items()}
