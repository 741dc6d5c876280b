"""Model FLOPs by a stated formula, so that a figure here can be compared with anyone's."""

from megatron_qwen.config.lora import EMBEDDING, HEAD, LoraConfig, targets
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.estimate.parameters import count_parameters

FORMULA = (
    "per token: 6 x (parameters the token meets: layers with its top-k and shared experts, router, output matrix; "
    "not the input embedding) + 12 x layers x heads x head_dim x sequence (scores and values over the full sequence, "
    "no causal discount); recompute not counted. With LoRA 4 x of frozen parameters: they have no weight gradient"
)


def training_flops_per_token(model: ModelConfig, seq_length: int, lora: LoraConfig | None = None) -> float:
    """FLOPs that training on one token takes by ``FORMULA``.

    Args:
        model: the shape.
        seq_length: tokens in a sample; the attention term grows with it.
        lora: of the run; None, or one without a rank, trains all weights.
    """
    count = count_parameters(model)
    met = count.active - count.embedding - count.output + model.vocab_size * model.hidden_size
    scores = 2 * model.num_layers * model.num_attention_heads * model.head_dim * seq_length
    if lora is None or lora.rank is None:
        return 6.0 * (met + scores)
    own = _adapters_met(model, lora)
    whole = model.vocab_size * model.hidden_size if _trains_output(model, lora) else 0
    return 4.0 * (met - whole) + 6.0 * (whole + own + scores)


def _trains_output(model: ModelConfig, lora: LoraConfig) -> bool:
    return (EMBEDDING if model.share_embeddings_and_output_weights else HEAD) in lora.modules_to_save


def _adapters_met(model: ModelConfig, lora: LoraConfig) -> int:
    """Parameters of adapters that a token meets; an embedding's are looked up."""
    total = 0
    for target in targets(lora, model):
        copies = model.num_layers if target.per_layer else 1
        if target.name != EMBEDDING:
            total += copies * (model.moe_router_topk if target.per_expert else 1) * (target.inputs + target.outputs)
    return (lora.rank or 0) * total
