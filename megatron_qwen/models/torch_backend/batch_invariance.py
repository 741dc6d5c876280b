"""Forward passes in which a token's result depends on the tokens before it alone, to the last bit.

Not on what stands beside it in a batch, nor on how many tokens are computed at once. In such a pass training computes
what inference computes token by token (``inference/``): log-probabilities of a rollout are the trainer's own. He and
Thinking Machines Lab 2025, "Defeating Nondeterminism in LLM Inference", has the idea, for GPUs.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from megatron_qwen.models.torch_backend import invariant_gemm

aten = torch.ops.aten


class BatchInvariant(TorchDispatchMode):
    """Context of batch-invariant forward passes.

    Whatever multiplies matrices inside, of megatron-core's modules as well, does so by ``invariant_gemm``; attention
    is computed in whole blocks of queries (attention.py). On a CPU, in fp32; other tensors are computed as outside.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Computes one operation."""
        ours = _OURS.get(func)
        if ours is not None and invariant_gemm.concerns(args[0]):
            return ours(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def is_on() -> bool:
    """Whether this code runs inside of ``BatchInvariant``."""
    return any(isinstance(mode, BatchInvariant) for mode in _get_current_dispatch_mode_stack())


def _mm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return invariant_gemm.linear(x, weight.t())


def _mm_out(x: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    return out.copy_(_mm(x, weight))


def _addmm(
    bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    if beta == 1 and alpha == 1 and bias.dim() == 1:
        return invariant_gemm.linear(x, weight.t(), bias)
    return beta * bias + alpha * _mm(x, weight)


_OURS: dict[Any, Callable[..., torch.Tensor]] = {
    aten.mm.default: _mm,
    aten.mm.out: _mm_out,
    aten.addmm.default: _addmm,
    aten.linear.default: invariant_gemm.linear,
    aten.bmm.default: invariant_gemm.batched,
}
