"""Model FLOPs by a stated formula, so that a figure here can be compared with anyone's."""

from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.estimate.parameters import count_parameters

FORMULA = (
    "per token: 6 x (parameters the token meets: layers with its top-k and shared experts, router, output matrix; "
    "not the input embedding) + 12 x layers x heads x head_dim x sequence (scores and values over the full sequence, "
    "no causal discount); recompute not counted"
)


def training_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """FLOPs that training on one token takes by ``FORMULA``.

    Args:
        model: the shape.
        seq_length: tokens in a sample; the attention term grows with it.
    """
    count = count_parameters(model)
    met = count.active - count.embedding - count.output + model.vocab_size * model.hidden_size
    scores = 2 * model.num_layers * model.num_attention_heads * model.head_dim * seq_length
    return 6.0 * (met + scores)
