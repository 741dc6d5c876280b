"""All gloo groups of a process share one device, that is one thread that waits for their sockets.

Replaces: ``torch.distributed.distributed_c10d._create_gloo_process_group``.
Needed: with torch 2.15, which gives each group a device of its own. The thread of a device wakes up a hundred times a
    second, whether or not there is anything to read, and megatron-core makes some twenty groups a rank: an idle rank
    took 3 % of a core, with one device 0.2 %. Twenty-five steps of ``tiny_dense`` on two tensor-parallel ranks that
    share two cores took 7 to 25 % less CPU time.
When: before the first process group is made, on every process.
Can go: when torch shares devices between groups.
"""

import os
from typing import Any

from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import ProcessGroupGloo

from megatron_qwen.core_patches.replacement import wrap

_MAKER = "_create_gloo_process_group"
_THREADS = 2  # of each group, torch's own number


def apply() -> None:
    """Has every gloo group that is made from now on use one device; does nothing where it was applied before.

    With several interfaces in GLOO_SOCKET_IFNAME torch makes a device for each, and is left alone. So is a torch that
    does not make its groups with this function, which is private.
    """
    if "," not in os.environ.get("GLOO_SOCKET_IFNAME", "") and hasattr(distributed_c10d, _MAKER):
        wrap(distributed_c10d, _MAKER, _with_one_device)


def _with_one_device(plain: Any) -> Any:
    backend: Any = ProcessGroupGloo
    devices: list[Any] = []

    def create(group: Any, backend_options: object) -> Any:
        if getattr(group, "enable_reconfigure", False):
            return plain(group, backend_options)
        if not devices:
            devices.append(backend.create_default_device())
        options = backend._Options()
        options._devices, options._threads, options._timeout = devices, _THREADS, group.timeout
        options.global_ranks_in_group, options.group_name = group.global_ranks_in_group, group.group_id
        return backend(group.store, group.group_rank, group.group_size, options)

    return create
