"""The coefficients of routers' losses where a loss is divided by something else than tokens.

megatron-core adds balance and z-loss as sums over tokens, and divides them by what the main loss is divided by: in
pretraining the tokens with loss. A mean over sequences or pairs has a divisor some hundred times smaller, weights in
hundredths have one that is a hundred times larger. So the coefficients are multiplied by divisor / tokens with loss, as
the data has it: a coefficient means the same whatever a mean is over.
"""

import numpy as np

from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.errors import ConfigError, Problem

_LOOKED_AT = 1 << 20  # tokens at the beginning of each source
_LARGEST = 2**31  # megatron-core counts in int32


def with_router_losses(config: RunConfig, data: TrainingData) -> RunConfig:
    """The configuration to build a model with.

    Args:
        config: of the run.
        data: of the run.

    Raises:
        ConfigError: the divisor of a global batch has no place in an int32.
    """
    samples = config.training.global_batch_size * config.data.seq_length
    if data.loss_unit > 1 and samples * data.loss_unit >= _LARGEST:
        fix = f"tokens x {data.loss_unit} (--message-weights) are more than can be counted; make the batch smaller."
        raise ConfigError(Problem("training.global_batch_size x data.seq_length", f"{samples:,}", fix))
    model = config.model
    if not model.is_moe:
        return config
    factor = divisor_per_token(config, data)
    return config.with_section(
        "model",
        moe_aux_loss_coeff=model.moe_aux_loss_coeff * factor,
        moe_z_loss_coeff=None if model.moe_z_loss_coeff is None else model.moe_z_loss_coeff * factor,
    )


def divisor_per_token(config: RunConfig, data: TrainingData) -> float:
    """What the main loss is divided by, for each token with loss."""
    objective = config.objective
    if objective.kind == "pretrain" or (objective.kind == "sft" and objective.average == "token"):
        return float(data.loss_unit)
    tokens = carries = documents = 0
    for source in data.sources.values():
        stop = min(source.stop, _LOOKED_AT)
        mask = source.tokens.loss_mask(0, stop)
        tokens += stop
        carries += stop if mask is None else int(np.count_nonzero(mask))
        documents += source.tokens.document_at(stop - 1) + 1
    if objective.kind == "sft" and objective.average == "sample":
        return tokens / config.data.seq_length / max(carries, 1)
    return documents / max(carries, 1)
