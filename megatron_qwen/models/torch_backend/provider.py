"""The backend of plain torch modules: the same numbers on a CPU and on a GPU, no Transformer Engine needed."""

from functools import partial

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron_qwen.models.torch_backend import fp8_linear
from megatron_qwen.models.torch_backend.activation import SwiGLUActivation
from megatron_qwen.models.torch_backend.attention import TorchAttention
from megatron_qwen.models.torch_backend.experts import GroupedExperts
from megatron_qwen.models.torch_backend.linear import TorchColumnParallelLinear, TorchRowParallelLinear
from megatron_qwen.models.torch_backend.norm import RMSNorm

_LINEAR: dict[str | None, tuple[type, type]] = {
    None: (TorchColumnParallelLinear, TorchRowParallelLinear),
    "tensorwise": (fp8_linear.TensorwiseColumnParallelLinear, fp8_linear.TensorwiseRowParallelLinear),
    "blockwise": (fp8_linear.BlockwiseColumnParallelLinear, fp8_linear.BlockwiseRowParallelLinear),
}


class TorchSpecProvider(BackendSpecProvider):
    """Which module the layer spec takes for each part.

    Args:
        emulated_fp8: recipe that the linear layers imitate; None computes in the run's format.
    """

    def __init__(self, emulated_fp8: str | None = None) -> None:
        self.column, self.row = _LINEAR[emulated_fp8]

    def column_parallel_linear(self) -> type:
        """Linear split over its output features."""
        return self.column

    def row_parallel_linear(self) -> type:
        """Linear split over its input features."""
        return self.row

    def fuse_layernorm_and_linear(self) -> bool:
        """Norm and linear are two modules."""
        return False

    def column_parallel_layer_norm_linear(self) -> None:
        """There is no fused module."""

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False, has_residual: bool = False) -> type:
        """RMSNorm, whatever is asked: the family has no other."""
        return RMSNorm

    def core_attention(self) -> type:
        """SDPA, with context parallelism."""
        return TorchAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> object:
        """All experts in one operation, or one after the other."""
        return partial(
            GroupedExperts if moe_use_grouped_gemm else SequentialMLP,
            submodules=MLPSubmodules(linear_fc1=self.column, linear_fc2=self.row, activation_func=SwiGLUActivation),
        )

    def activation_func(self) -> type:
        """SwiGLU with one gradient buffer."""
        return SwiGLUActivation
