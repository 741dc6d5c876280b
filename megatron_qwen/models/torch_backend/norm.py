"""RMSNorm in plain torch that knows sequence parallelism."""

import torch
from megatron.core.transformer import TransformerConfig

from megatron_qwen.models.torch_backend.functions import RMSNormFunction


class RMSNorm(torch.nn.Module):
    """Root mean square norm over the last dimension (Zhang and Sennrich 2019).

    Under sequence parallelism each TP rank sees different tokens. The weight's attribute ``sequence_parallel`` makes
    megatron-core all-reduce its gradient over the TP group.

    Args:
        config: megatron-core's configuration; its sequence_parallel flag is read.
        hidden_size: size of the last dimension.
        eps: epsilon under the root.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises ``x``, [..., hidden_size]."""
        out: torch.Tensor = RMSNormFunction.apply(x, self.weight, self.eps)
        return out
