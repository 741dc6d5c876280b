"""All gloo groups of a process share one device, that is one thread that waits for their sockets.

Replaced: ``torch.distributed.distributed_c10d._create_gloo_process_group`` (seen in torch 2.15). torch gives each group
a device of its own. The thread of a device wakes up a hundred times a second, whether or not there is anything to read,
and megatron-core makes some twenty groups a rank: an idle rank took 3 % of a core, with one device 0.2 %. Twenty-five
steps of ``tiny_dense`` on two tensor-parallel ranks that share two cores took 7 to 25 % less CPU time.

It can go when torch shares devices between groups.
"""

import os
from typing import Any

from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import ProcessGroupGloo

_THREADS = 2  # of each group, torch's own number


def apply() -> None:
    """Has every gloo group that is made from now on use one device; does nothing where it was applied before.

    With several interfaces in GLOO_SOCKET_IFNAME torch makes a device for each, and is left alone.
    """
    plain: Any = distributed_c10d._create_gloo_process_group
    if getattr(plain, "shares_device", False) or "," in os.environ.get("GLOO_SOCKET_IFNAME", ""):
        return
    devices: list[Any] = []

    def create(group: Any, backend_options: object) -> Any:
        if group.enable_reconfigure:
            return plain(group, backend_options)
        if not devices:
            devices.append(ProcessGroupGloo.create_default_device())
        options = ProcessGroupGloo._Options()
        options._devices, options._threads, options._timeout = devices, _THREADS, group.timeout
        options.global_ranks_in_group, options.group_name = group.global_ranks_in_group, group.group_id
        return ProcessGroupGloo(group.store, group.group_rank, group.group_size, options)

    create.shares_device = True  # type: ignore[attr-defined]
    distributed_c10d._create_gloo_process_group = create
