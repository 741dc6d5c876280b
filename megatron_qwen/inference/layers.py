"""The layers of a stage in inference: the parameters and the arithmetic of the modules that train, nothing else.

The modules' wrappers (hooks, autograd functions, dropout, checks) take as long as the arithmetic where a step has one
token a sequence. Every operation here is the one of ``models/torch_backend``, in the same order, so the bits are those
of the training forward. Mixture-of-experts parts are called as modules.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP

from megatron_qwen.inference.weight_product import Product
from megatron_qwen.models.torch_backend.batch_invariance import BatchInvariant
from megatron_qwen.models.torch_backend.functions import rms_norm, rotate_qkv, swiglu
from megatron_qwen.models.torch_backend.process_kernels import PROCESS_KERNELS


class Attend(Protocol):
    """Attention over cached keys and values."""

    def __call__(self, layer: int, query: torch.Tensor, both: torch.Tensor, scale: float) -> torch.Tensor:
        """Attends.

        Args:
            layer: of this stage, from 0.
            query: [key heads, heads of a key head, n, d].
            both: keys and values, [2, key heads, n, d].
            scale: factor on the scores.

        Returns:
            [n, heads x d].
        """


class Layers:
    """The transformer layers and the final norm of a stage.

    Args:
        decoder: megatron-core's block, of the torch backend.
        groups: of this rank.
        sequence_parallel: whether hidden states are split over the TP ranks.
        product: makes products with weights (``weight_product.Products``).
    """

    def __init__(
        self,
        decoder: Any,
        groups: ProcessGroupCollection,
        *,
        sequence_parallel: bool,
        product: Callable[[torch.Tensor, torch.Tensor | None], Product],
    ) -> None:
        traffic = _Traffic(groups.tp, sequence_parallel)
        self._layers = [_Layer(layer, number, traffic, product) for number, layer in enumerate(decoder.layers)]
        self._final = None if decoder.final_layernorm is None else _Norm(decoder.final_layernorm)

    def __call__(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attend: Attend,
        *,
        only: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[n, h] -> [n, h]; n / TP under sequence parallelism.

        Args:
            hidden: of the tokens.
            cos: of the tokens' rotary angles, [n, d / 2].
            sin: the same.
            attend: attention of this step.
            only: rows that are wanted, at least 4; not under sequence parallelism. None is all.

        Returns:
            Of these rows.
        """
        rotation = _Rotation(cos, sin)
        for layer in self._layers:
            hidden = layer(hidden, rotation, attend, only if layer is self._layers[-1] else None)
        return hidden if self._final is None else self._final(hidden)


class _Traffic:
    """What TP ranks exchange around a pair of products: as megatron-core's column- and row-parallel layers."""

    def __init__(self, group: dist.ProcessGroup, sequence_parallel: bool) -> None:
        self._group, self._split, self._alone = group, sequence_parallel, group.size() == 1

    def before(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens' rows."""
        if self._alone or not self._split:
            return x
        whole: torch.Tensor = tensor_parallel.gather_from_sequence_parallel_region(x, group=self._group)
        return whole

    def after(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks: of all tokens, or of this rank's."""
        if self._alone:
            return x
        if self._split:
            own: torch.Tensor = tensor_parallel.reduce_scatter_to_sequence_parallel_region(x, group=self._group)
            return own
        dist.all_reduce(x, group=self._group)
        return x


class _Norm:
    """RMSNorm: ``functions.rms_norm`` with fewer operations, of the same bits."""

    def __init__(self, module: Any) -> None:
        weight = module.weight.detach()
        self._weight, self._eps = weight, module.eps
        self._eps_of, self._size = (
            torch.tensor(value, dtype=torch.float32, device=weight.device) for value in (module.eps, float(len(weight)))
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if PROCESS_KERNELS.present is not None:
            return rms_norm(x, self._weight, self._eps)[0]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcdiv(self._eps_of, norm.square_(), self._size).rsqrt_()
        return (x * (scale if x.dtype == torch.float32 else scale.to(x.dtype))).mul_(self._weight)


class _Rotation:
    """RoPE of queries and keys in one go, as ``functions.rotate_qkv``."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        self._cos, self._sin = cos, sin

    def __call__(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, groups, slots, d] -> queries [groups, slots - 2, n, d], and keys and values [2, groups, n, d]."""
        if PROCESS_KERNELS.present is not None:
            query, *both = rotate_qkv(mixed.unsqueeze(1), self._cos, self._sin)
            return query[0].unflatten(0, (mixed.shape[1], -1)), torch.cat(both)
        by_head = mixed.permute(1, 2, 0, 3)
        first, second = by_head[:, :-1].chunk(2, dim=-1)
        groups, slots, count, d = by_head.shape
        out = mixed.new_empty(groups, slots - 1, count, d)
        out_first, out_second = out.chunk(2, dim=-1)
        torch.mul(first, self._cos, out=out_first).addcmul_(second, self._sin, value=-1)
        torch.mul(second, self._cos, out=out_second).addcmul_(first, self._sin)
        return out[:, :-1], torch.stack((out[:, -1], by_head[:, -1]))


class _Layer:
    def __init__(
        self,
        layer: Any,
        number: int,
        traffic: _Traffic,
        product: Callable[[torch.Tensor, torch.Tensor | None], Product],
    ) -> None:
        attention = layer.self_attention
        self._number, self._traffic = number, traffic
        self._first, self._second = _Norm(layer.input_layernorm), _Norm(layer.pre_mlp_layernorm)
        qkv, proj = attention.linear_qkv, attention.linear_proj
        assert proj.bias is None
        self._qkv = product(qkv.weight.detach(), None if qkv.bias is None else qkv.bias.detach())
        self._proj = product(proj.weight.detach(), None)
        self._groups, self._d = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        self._slots = attention.num_attention_heads_per_partition // self._groups + 2
        self._scale = attention.core_attention.scale or self._d**-0.5
        self._q_norm: _Norm | None = None
        self._k_norm: _Norm | None = None
        if attention.config.qk_layernorm:
            self._q_norm, self._k_norm = _Norm(attention.q_layernorm), _Norm(attention.k_layernorm)
        self._mlp = _dense(layer.mlp, traffic, product) if isinstance(layer.mlp, MLP) else _module(layer.mlp)

    def __call__(
        self, hidden: torch.Tensor, rotation: _Rotation, attend: Attend, only: torch.Tensor | None
    ) -> torch.Tensor:
        mixed = self._qkv(self._traffic.before(self._first(hidden)))
        mixed = mixed.view(-1, self._groups, self._slots, self._d)
        if self._q_norm is not None and self._k_norm is not None:
            query, key, value = mixed.split((self._slots - 2, 1, 1), dim=2)
            mixed = torch.cat((self._q_norm(query), self._k_norm(key), value), dim=2)
        query, both = rotation(mixed)
        context = attend(self._number, query, both, self._scale)
        if only is not None:
            context, hidden = context[only], hidden[only]
        hidden = self._traffic.after(self._proj(context)).add_(hidden)
        return self._mlp(self._second(hidden)).add_(hidden)


def _dense(mlp: Any, traffic: _Traffic, product: Callable[[torch.Tensor, torch.Tensor | None], Product]) -> Product:
    first, second = (product(part.weight.detach(), None) for part in (mlp.linear_fc1, mlp.linear_fc2))
    return lambda x: traffic.after(second(swiglu(first(traffic.before(x)))))


def _module(mlp: Any) -> Product:
    def call(x: torch.Tensor) -> torch.Tensor:
        # In inference mode torch would not divide operations into those that the context replaces.
        with torch.inference_mode(False), torch.no_grad(), BatchInvariant():
            found, bias = mlp(x.clone().unsqueeze(1))
        assert bias is None
        out: torch.Tensor = found.squeeze(1)
        return out

    return call
