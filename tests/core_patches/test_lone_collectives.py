"""A collective of one rank in place is over before it begins."""

from typing import Any

import torch
import torch.distributed as dist

from megatron_qwen.core_patches.lone_collectives import Done


def observe(prepared: bool) -> dict[str, Any]:
    """Which handles torch gives, and what becomes of the memory."""
    buffer = torch.arange(4.0)
    in_place = [
        dist.all_gather_into_tensor(buffer, buffer, async_op=True),
        dist.reduce_scatter_tensor(buffer, buffer, async_op=True),
    ]
    apart, source = torch.zeros(4), torch.arange(4.0)
    elsewhere = dist.all_gather_into_tensor(apart, source, async_op=True)
    for handle in (*in_place, elsewhere):
        handle.wait()
    assert dist.reduce_scatter_tensor(buffer, buffer) is None
    return {
        "in place": [type(handle) is Done for handle in in_place],
        "elsewhere": type(elsewhere) is Done,
        "buffers": [buffer.tolist(), apart.tolist()],
    }


def test_in_place_nothing_is_done(observed):
    values = [0.0, 1.0, 2.0, 3.0]
    assert observed.prepared == {"in place": [True, True], "elsewhere": False, "buffers": [values, values]}
    assert observed.plain == {"in place": [False, False], "elsewhere": False, "buffers": [values, values]}


def test_the_handle_is_over():
    assert Done().wait()
    assert Done().is_completed()
