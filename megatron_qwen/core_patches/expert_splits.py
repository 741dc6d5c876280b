"""The split sizes of the experts' all-to-all are host lists on a CPU too.

Replaces: ``maybe_move_tensor_to_cpu`` of ``megatron.core.transformer.moe.moe_utils``, and the name that
    ``token_dispatcher`` has bound.
Needed: with megatron-core 0.19.2, which turns split sizes into numpy arrays only where they are CUDA tensors; the
    all-to-all takes host integers and refuses the CPU tensors that are left otherwise.
When: after megatron.core is imported, on processes without a GPU.
Can go: when that function honours ``as_numpy`` for CPU tensors.
"""

from typing import Any

import torch


def apply() -> None:
    """Replaces both names; what is replaced is the same after every call."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    moe_utils.maybe_move_tensor_to_cpu = _host_list
    token_dispatcher.maybe_move_tensor_to_cpu = _host_list


def _host_list(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
