"""Split sizes of the experts' all-to-all are host arrays."""

import torch


def observe(prepared: bool) -> list[str]:
    """What the token dispatcher gets for split sizes, for a count that stays a tensor, and for no sizes."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    move = token_dispatcher.maybe_move_tensor_to_cpu
    assert move is moe_utils.maybe_move_tensor_to_cpu
    found = (move(torch.tensor([1, 2]), as_numpy=True), move(torch.tensor([1, 2])), move(None, as_numpy=True))
    return [type(one).__name__ for one in found]


def test_host_arrays(observed):
    assert observed.prepared == ["ndarray", "Tensor", "NoneType"]
    assert observed.plain == ["Tensor", "Tensor", "NoneType"]
