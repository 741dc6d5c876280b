"""Where causal attention on a CPU is computed by blocks of queries, and what that keeps for the backward pass."""

from megatron_qwen.config.run import RunConfig

BLOCK = 64  # queries; fewer waste less on what is masked, more make larger products
# Scores of fewer are done before a dozen operations are called; those of more keys leave the cache between two of them,
# and would outweigh everything else that a layer keeps.
_LEAST_SCORES, _MOST_KEYS = 2**20, 1024


def pays(scores: int, keys: int) -> bool:
    """Whether blocks are faster than torch's own kernel, by shapes that were tried on two cores of an AMD EPYC.

    Args:
        scores: sequences x heads x queries x keys.
        keys: those that the last query sees.
    """
    return scores >= _LEAST_SCORES and keys <= _MOST_KEYS


def kept(config: RunConfig) -> float:
    """Scalars a token and layer that attention keeps for its backward pass beside Q, K, V and what it hands on.

    Blocks keep their probabilities; torch's kernel keeps its output, in an order that is not the projection's. Of
    context-parallel ranks the one that keeps most counts, and of rows that are split by their documents the split that
    keeps most.
    """
    model, parallel = config.model, config.parallel
    tp, cp, length = parallel.tensor_model_parallel_size, parallel.context_parallel_size, config.data.seq_length
    heads = model.num_attention_heads // tp
    blocks = not model.attention_dropout and not (config.data.reset_attention_mask and cp > 1)

    def part(queries: int, keys: int) -> float:
        if not blocks or not pays(config.training.micro_batch_size * heads * queries * keys, keys):
            return queries * heads * model.head_dim
        ends = [min(start + BLOCK, queries) for start in range(0, queries, BLOCK)]
        first = keys - queries
        return heads * sum((end - start) * (first + end) for start, end in zip([0, *ends], ends, strict=False))

    if cp == 1:
        lengths = (length, min(length, _MOST_KEYS)) if config.data.reset_attention_mask else (length,)
        return max(part(one, one) / one for one in lengths)
    chunk = length // (2 * cp)  # a rank has chunks r and 2 CP - 1 - r of the sequence, and the keys up to their ends
    ranks = [part(chunk, (r + 1) * chunk) + part(chunk, (2 * cp - r) * chunk) for r in range(cp)]
    return max(ranks) / (2 * chunk)
