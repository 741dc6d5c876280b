"""The feed-forward's activation in plain torch."""

import torch
from megatron.core.transformer import TransformerConfig

from megatron_qwen.models.torch_backend.functions import SwiGLU


class SwiGLUActivation(torch.nn.Module):
    """SwiGLU on concatenated gate and up.

    Args:
        config: megatron-core passes its configuration; not read.
    """

    def __init__(self, *, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., 2 f] -> [..., f]."""
        out: torch.Tensor = SwiGLU.apply(x)
        return out
