"""Tensors of published directories that a model of the family does not need, and whether they change it.

Older transformers stored the frequencies of RoPE; some programs store the output layer of a tied model as well.
transformers passes over both. Here they are passed over only if they say what the model computes without them.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from megatron_qwen.config.run import Architecture

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_FREQUENCIES = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# Frequencies may have been rounded to bf16, which keeps 8 bits.
_TOLERANCE = 2.0**-8
_ROWS = 1024
_OTHER_HEAD = (
    "differs from the embedding, and config.json says tie_word_embeddings: programs differ in which they use. Set "
    "tie_word_embeddings to false to keep the tensor, or remove it."
)
_OTHER_FREQUENCIES = (
    "holds other frequencies than rope_theta gives; the model would be another without it. Set rope_theta to the value "
    "it was trained with, or remove the tensor."
)


class Rows(Protocol):
    """A source of rows."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor."""


def may_be_surplus(name: str) -> bool:
    """Whether a model of the family may come without this tensor."""
    return name == HEAD or _FREQUENCIES.fullmatch(name) is not None


def surplus_faults(
    source: Rows, extra: Iterable[tuple[str, tuple[int, ...]]], architecture: Architecture
) -> Iterator[tuple[str, str | None]]:
    """Of surplus tensors, those that may be passed over (None) and what is wrong with the others.

    Args:
        source: where their values are.
        extra: names and shapes; others than ``may_be_surplus`` are not among what is returned.
        architecture: of the model.
    """
    model = architecture.model
    for name, shape in extra:
        if name == HEAD and model.share_embeddings_and_output_weights:
            same = _equal(source, shape, (model.vocab_size, model.hidden_size))
            yield name, None if same else _OTHER_HEAD
        elif _FREQUENCIES.fullmatch(name):
            yield name, None if _are_of_rope(source, name, shape, architecture) else _OTHER_FREQUENCIES


def _are_of_rope(source: Rows, name: str, shape: tuple[int, ...], architecture: Architecture) -> bool:
    width = architecture.model.head_dim
    wanted = architecture.rope.base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    if shape != tuple(wanted.shape):
        return False
    return bool(((source.rows(name, 0, shape[0]).double() - wanted).abs() <= _TOLERANCE * wanted).all())


def _equal(source: Rows, shape: tuple[int, ...], wanted: tuple[int, int]) -> bool:
    if shape != wanted:
        return False
    for start in range(0, shape[0], _ROWS):
        stop = min(start + _ROWS, shape[0])
        head, embedding = source.rows(HEAD, start, stop), source.rows(EMBEDDING, start, stop)
        if head.dtype != embedding.dtype or not torch.equal(head, embedding):
            return False
    return True
