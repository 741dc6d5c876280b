"""When causal attention on a CPU is computed in blocks of queries, and what it keeps for the backward pass."""

from megatron_qwen.config.run import RunConfig

BLOCK = 64  # queries; smaller blocks compute fewer masked scores, larger blocks make larger GEMMs
# Below this number of scores, calling the dozen operations costs more than computing them. Above this number of keys,
# the scores of a block leave the cache between operations, and would exceed everything else that a layer keeps.
_LEAST_SCORES, _MOST_KEYS = 2**20, 1024


def pays(scores: int, keys: int) -> bool:
    """Whether blocks are faster than torch's own kernel, by shapes that were tried on two cores of an AMD EPYC.

    Args:
        scores: sequences x heads x queries x keys.
        keys: keys that the last query sees.
    """
    return scores >= _LEAST_SCORES and keys <= _MOST_KEYS


def kept(config: RunConfig) -> float:
    """Scalars per token and layer that attention keeps for the backward pass, besides Q, K, V and the context.

    Blocks keep their probabilities. torch's kernel keeps its output in its own layout, which is not that of the output
    projection's input. The maximum over context-parallel ranks counts, and for packed sequences the maximum over their
    possible lengths.
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
