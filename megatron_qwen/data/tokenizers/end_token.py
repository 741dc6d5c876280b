"""Which token ends a document: the one that is asked for, or the one that the tokenizer's own files name."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_qwen.errors import DataError, Problem

END_OF_TEXT = "<|endoftext|>"
# An instruct model's tokenizer names the token that ends a turn; documents do not end with it. Qwen's own pretraining
# data ends documents with <|endoftext|>, which its instruct tokenizers have as well.
_ENDS_A_TURN = frozenset(("<|im_end|>", "<|eot_id|>", "<|eot|>", "<|end|>", "<end_of_turn>", "<turn|>"))


@dataclass(frozen=True)
class EndToken:
    """The token that ends a document.

    Args:
        name: the token.
        id: of it.
        passed_over: the eos_token of the tokenizer's files, where that ends a turn of a conversation instead.
    """

    name: str
    id: int
    passed_over: str | None = None


def end_token(
    directory: Path, id_of: Callable[[str], int | None], *, asked: str | None, own: str = END_OF_TEXT
) -> EndToken:
    """The token that ends a document.

    Args:
        directory: of the tokenizer.
        id_of: the id of a token; None if there is no such token.
        asked: the token to use; None takes the one that ``tokenizer_config.json`` or ``special_tokens_map.json`` names
            as ``eos_token``, unless it ends a turn of a conversation; then, or where they name none, ``own``.
        own: what ends a document where no other file says so.

    Raises:
        DataError: the tokenizer has no such token.
    """
    named = _named(directory)
    passed_over = named if asked is None and named in _ENDS_A_TURN else None
    if asked is None:
        asked = own if named is None or passed_over is not None else named
    if (found := id_of(asked)) is None:
        said = f"names {named} as eos_token and" if named is not None else "names no eos_token and"
        fix = f"{said} has no token {asked}, which would mark the end of a document; name one with --end-token."
        raise DataError(Problem(str(directory), None, fix))
    return EndToken(asked, found, passed_over)


def _named(directory: Path) -> str | None:
    """The eos_token of a tokenizer's files."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            content: Any = json.loads((directory / name).read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError):
            raise DataError(Problem(str(directory / name), None, "is not valid JSON; fix it.")) from None
        token = content.get("eos_token") if isinstance(content, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token:
            return token
    return None
