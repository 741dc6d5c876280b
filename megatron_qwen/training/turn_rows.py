"""Rows of the control tokens of turns in embedding and output layer, which a base model may never have trained.

A base model has read no ``<|im_start|>`` and no ``<|im_end|>``: their rows are what initialisation and weight decay
have left. Fine-tuning trains them, but from a start that says nothing; and a run that does not train them gives a model
that never stops. Here such rows are noticed, and can begin as the mean of the rows of words that describe them.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.training.components import TrainingComponents

log = logging.getLogger(__name__)

# Rows that no token has are compared with: from so many on their spread is known, and more than this are not needed.
_LEAST_UNUSED, _MOST_UNUSED = 8, 256
# A row is as if untrained within this many times the distance of the furthest unused row from their mean. Trained rows
# of the small models of tests/training/test_turn_rows.py are at 1.3 and more.
_NEAR = 1.1
_FIELD = "objective.token_descriptions"


def described_rows(config: RunConfig) -> dict[int, list[int]]:
    """Ids of the words that describe each token, by the token's id.

    Raises:
        ConfigError: a name is no control token of the tokenizer.
    """
    wanted = config.objective.token_descriptions
    if not wanted:
        return {}
    assert config.data.tokenizer is not None  # checked with the configuration
    tokenizer = load_tokenizer(Path(config.data.tokenizer))
    found, wrong = {}, []
    for name, words in wanted.items():
        index = tokenizer.spellable.get(name)
        (ids,) = tokenizer.encode_batch([words], control_as_text=True)
        if index is None:
            known = ", ".join(list(tokenizer.spellable)[:8]) or "none"
            wrong.append(Problem(_FIELD, name, f"is no control token of {config.data.tokenizer} (it has {known})."))
        else:
            found[index] = ids
    if wrong:
        raise ConfigError(wrong)
    return found


def describe(modules: Sequence[GPTModel], rows: Mapping[int, Sequence[int]], tp: dist.ProcessGroup) -> None:
    """Sets rows to means of other rows, in fp32, in every vocabulary matrix of this rank; alike under every layout.

    Args:
        modules: chunks of this rank.
        rows: ids of which each row is the mean, by its id.
        tp: ranks that share the vocabulary.
    """
    for weight in _matrices(modules):
        means = {index: _rows(weight, ids, tp).mean(dim=0) for index, ids in rows.items()}
        first = weight.shape[0] * tp.rank()
        with torch.no_grad():
            for index, mean in means.items():
                if 0 <= index - first < weight.shape[0]:
                    weight[index - first] = mean.to(weight.dtype)


def untrained(
    modules: Sequence[GPTModel],
    tokens: Mapping[str, int],
    unused: Sequence[int],
    tp: dist.ProcessGroup,
    *,
    frozen: bool = False,
) -> list[str]:
    """Names of tokens whose rows are, in any matrix of any rank, like those that no token has; all ranks call it.

    Args:
        modules: chunks of this rank.
        tokens: ids by name.
        unused: ids of rows that no token has.
        tp: ranks that share the vocabulary.
        frozen: look at matrices that are not trained, alone.

    Returns:
        The same on every rank; empty where there are too few unused rows to say.
    """
    names = sorted(tokens)
    if len(unused) < _LEAST_UNUSED or not names:
        return []
    place = next(modules[0].parameters()).device
    like = torch.zeros(len(names), dtype=torch.int32, device=place)
    for weight in _matrices(modules):
        if frozen and weight.requires_grad:
            continue
        others = _rows(weight, unused[:_MOST_UNUSED], tp)
        middle = others.mean(dim=0)
        limit = _NEAR * (others - middle).norm(dim=1).max()
        distances = (_rows(weight, [tokens[name] for name in names], tp) - middle).norm(dim=1)
        like |= (distances <= limit).int()
    dist.all_reduce(like, op=dist.ReduceOp.MAX)
    return [name for name, found in zip(names, like.tolist(), strict=True) if found]


def tell_of_untrained(components: TrainingComponents) -> None:
    """Warns of a start whose rows of turn tokens look untrained; all ranks call it.

    Raises:
        ConfigError: such rows are frozen.
    """
    data, model = components.data, components.config.model
    unused = range(tokens_in_use(data), model.vocab_size)
    modules, tp = components.model.modules, components.groups.tp
    if stay := untrained(modules, data.turn_tokens, unused, tp, frozen=True):
        names = ["embed_tokens"] if model.share_embeddings_and_output_weights else ["embed_tokens", "lm_head"]
        fix = (
            f"leaves the rows of {', '.join(stay)} as they are, which look untrained: they are like those that no "
            "token has, and a model with such rows does not end its turns. Train them "
            f"(lora.modules_to_save={json.dumps(names)}), or begin from a model that knows these tokens."
        )
        raise ConfigError(Problem("lora.modules_to_save", list(components.config.lora.modules_to_save), fix))
    found = untrained(modules, data.turn_tokens, unused, tp)
    if found and dist.get_rank() == 0:
        end = next((name for name in found if data.turn_tokens[name] in data.ends_of_turn), None)
        meaning = "beginning of a turn" if end is None else "end of the turn"
        example = f'{_FIELD}={{"{end or found[0]}": "{meaning}"}}'
        log.warning(
            "the rows of %s look untrained: they are like those that no token has. Fine-tuning trains them; %s begins "
            "with the mean of the words' rows.",
            ", ".join(found),
            example,
        )


def tokens_in_use(data: TrainingData) -> int:
    """Ids that any tokenizer of the data has; rows from there on belong to none."""
    manifests = [source.manifest for source in data.sources.values()]
    return max((noted.vocab_size for noted in manifests if noted is not None), default=data.config.model.vocab_size)


def _matrices(modules: Sequence[GPTModel]) -> Iterator[torch.Tensor]:
    """The embedding, and the output layer where it has rows of its own or a copy on another pipeline stage."""
    for module in modules:
        if module.pre_process:
            yield module.embedding.word_embeddings.weight
        if module.post_process and module.output_layer.weight is not None:
            yield module.output_layer.weight


def _rows(weight: torch.Tensor, ids: Sequence[int], tp: dist.ProcessGroup) -> torch.Tensor:
    """Rows of the whole matrix in fp32, [n, h], on every rank of the group: one has each, the others add zeros."""
    local = torch.tensor(list(ids), device=weight.device) - weight.shape[0] * tp.rank()
    mine = (local >= 0) & (local < weight.shape[0])
    found = torch.zeros(len(ids), weight.shape[1], dtype=torch.float32, device=weight.device)
    found[mine] = weight.detach()[local[mine]].float()
    if tp.size() > 1:
        dist.all_reduce(found, group=tp)
    return found
