"""megatron-core specs of the model's layers, for either backend."""

from typing import Any, cast

from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_qwen.models.backend import Backend


def block_spec(
    core: TransformerConfig, backend: Backend, *, vp_stage: int | None, pp_rank: int, adapters: bool = False
) -> object:
    """TransformerBlockSubmodules of one model chunk: the specs of its layers, and the final norm.

    Args:
        core: megatron-core's configuration.
        backend: whose modules the layers are made of.
        vp_stage: virtual stage of the chunk.
        pp_rank: pipeline stage.
        adapters: the layers get adapters, which read a linear layer's input: no norm may be fused with it.
    """
    count = get_num_layers_to_build(core, vp_stage=vp_stage, pp_rank=pp_rank)
    first = get_transformer_layer_offset(core, vp_stage=vp_stage, pp_rank=pp_rank)

    def provider(number: int) -> BackendSpecProvider:
        found = _provider(core, backend, number)
        return cast(BackendSpecProvider, _Unfused(found)) if adapters else found

    layers = [_layer(core, backend, provider(number)) for number in range(first, first + count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=backend.provider.layer_norm(rms_norm=True))


class _Unfused:
    """A provider whose norms and linear layers are modules of their own.

    Args:
        provider: of the backend.
    """

    def __init__(self, provider: BackendSpecProvider) -> None:
        self._provider = provider

    def __getattr__(self, name: str) -> Any:
        return getattr(self._provider, name)

    def fuse_layernorm_and_linear(self) -> bool:
        """They are not."""
        return False

    def column_parallel_layer_norm_linear(self) -> None:
        """There is no fused module."""


def _provider(core: TransformerConfig, backend: Backend, number: int) -> BackendSpecProvider:
    """The provider of the modules of layer ``number``, counted from 0 over the whole model."""
    if backend.fp8_provider is None or is_first_last_bf16_layer(core, number):
        return backend.provider
    return backend.fp8_provider


def _layer(core: TransformerConfig, backend: Backend, provider: BackendSpecProvider) -> ModuleSpec:
    fused = provider.fuse_layernorm_and_linear()
    linear = provider.column_parallel_linear()
    norm = provider.layer_norm(rms_norm=True, has_residual=True)
    head_norm = provider.layer_norm(rms_norm=True, for_qk=True) if core.qk_layernorm else IdentityOp
    moe = core.num_moe_experts is not None
    # Both backends save norms under the names that Transformer Engine's fused layer-norm-and-linear modules give them,
    # so that each loads the other's checkpoints.
    saved_as = {} if fused else {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not fused and not moe:
        saved_as["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    attention = ModuleSpec(
        module=backend.self_attention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=provider.column_parallel_layer_norm_linear() if fused else linear,
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused else norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm if moe or not fused else IdentityOp,
            mlp=get_mlp_module_spec_for_backend(
                backend=provider,
                num_experts=core.num_moe_experts,
                moe_grouped_gemm=core.moe_grouped_gemm,
                use_te_activation_func=core.use_te_activation_func,
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=saved_as,
        ),
    )
