"""The tokens of a vocabulary as a GGUF file has them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from checkpoints_convert.formats.gguf.container import Value


class TokenType(IntEnum):
    """What a token is: ``llama_token_type`` of llama.h.

    llama.cpp finds a user-defined token in any text, and one of control only where it is asked to read control tokens.
    """

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Tokens:
    """A vocabulary.

    Args:
        model: ``tokenizer.ggml.model``: ``gpt2`` is byte-level BPE, ``llama`` SentencePiece's BPE.
        pre: ``tokenizer.ggml.pre``: how text is split.
        names: by id; empty where an id has no token.
        types: of each.
        scores: of each, where the model has them.
        merges: pairs, the first to be merged first.
        more: further keys, behind ``tokenizer.ggml.``.
    """

    model: str
    pre: str
    names: Sequence[str]
    types: Sequence[TokenType]
    scores: Sequence[float] = ()
    merges: Sequence[str] = ()
    more: Mapping[str, Value] = field(default_factory=dict)
