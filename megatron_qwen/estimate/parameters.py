"""Exact parameter counts of a model shape."""

from dataclasses import dataclass

from megatron_qwen.config.sections import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by where they sit; every number counts scalars of the whole model."""

    embedding: int
    output: int
    attention: int
    dense_mlp: int
    router: int
    routed_experts: int
    active_experts: int
    shared_expert: int
    norms: int

    @property
    def total(self) -> int:
        """All parameters that are stored."""
        return (
            self.embedding
            + self.output
            + self.attention
            + self.dense_mlp
            + self.router
            + self.routed_experts
            + self.shared_expert
            + self.norms
        )

    @property
    def active(self) -> int:
        """Parameters that one token uses: all but the experts it is not sent to."""
        return self.total - self.routed_experts + self.active_experts

    @property
    def without_embeddings(self) -> int:
        """Total less input embedding and output matrix, the N of most scaling laws."""
        return self.total - self.embedding - self.output


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Counts the parameters of ``model`` as exported, without vocabulary padding."""
    h, layers = model.hidden_size, model.num_layers
    q, kv = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    attention = h * (q + 2 * kv) + (q + 2 * kv if model.add_qkv_bias else 0) + q * h
    expert = 3 * h * (model.moe_ffn_hidden_size or 0)
    shared = 3 * h * (model.moe_shared_expert_intermediate_size or 0) + (h if model.moe_shared_expert_gate else 0)
    experts = model.num_moe_experts or 0
    embedding = model.vocab_size * h
    head_norms = 2 * model.head_dim if model.qk_layernorm else 0
    return ParameterCount(
        embedding=embedding,
        output=0 if model.share_embeddings_and_output_weights else embedding,
        attention=layers * attention,
        dense_mlp=0 if model.is_moe else layers * 3 * h * model.ffn_hidden_size,
        router=layers * experts * h,
        routed_experts=layers * experts * expert,
        active_experts=layers * model.moe_router_topk * expert if model.is_moe else 0,
        shared_expert=layers * shared if model.is_moe else 0,
        norms=layers * (2 * h + head_norms) + h,
    )
