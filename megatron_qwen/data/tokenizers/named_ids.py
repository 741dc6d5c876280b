"""Ids of the tokens that a model's files name: where texts begin and end."""

import json
from pathlib import Path
from typing import Any

from megatron_qwen.data.tokenizers.end_token import end_token
from megatron_qwen.data.tokenizers.tokenizer import Tokenizer, deciding_file, load_tokenizer
from megatron_qwen.errors import DataError, Problem


def beginning_of_text(directory: Path, tokenizer: Tokenizer) -> int:
    """Id that stands in front of a text without a beginning: the tokenizer's bos_token, or its eos_token."""
    try:
        stated = json.loads((directory / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        stated = {}
    for name in ("bos_token", "eos_token"):
        token = stated.get(name) if isinstance(stated, dict) else None
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and (found := tokenizer.control_tokens.get(text)) is not None:
            return found
    return tokenizer.end_of_text


def special_ids(directory: Path, *, below: int) -> tuple[int | list[int] | None, int | None]:
    """(eos, bos) for config.json.

    Taken from generation_config.json if the tokenizer came with one, and that is of this tokenizer. Otherwise both are
    the token that ends a document, as in the base models of the family, or the one that the tokenizer names as
    eos_token; None where it has neither.

    Args:
        directory: of the tokenizer.
        below: size of the model's vocabulary, which has every id.

    Raises:
        DataError: the tokenizer cannot be read.
    """
    try:
        noted = json.loads((directory / "generation_config.json").read_text())
    except FileNotFoundError:
        noted = {}
    except (OSError, ValueError):
        raise DataError(
            Problem(str(directory / "generation_config.json"), None, "is not valid JSON; fix it.")
        ) from None
    if not isinstance(noted, dict) or not _are_ids(noted.get("eos_token_id"), below):
        end = _named_end(directory)
        return (end, end) if _are_ids(end, below) else (None, None)
    bos = noted.get("bos_token_id")
    return noted["eos_token_id"], bos if isinstance(bos, int) and _are_ids(bos, below) else None


def _named_end(directory: Path) -> int | None:
    """Id that ends a document, or of the eos_token that the tokenizer's files name; None where it has neither."""
    path = deciding_file(directory)
    if path.suffix != ".json":
        tokenizer = load_tokenizer(directory)
        try:
            return tokenizer.end_of_text
        except DataError:
            return None
    from megatron_qwen.data.tokenizers.content import TokenizerContent

    content = TokenizerContent(path)
    named = end_token(directory, lambda _: 0, asked=None)  # the names alone: no name is refused for having no id
    found = (content.id_of(name) for name in (named.name, named.passed_over) if name is not None)
    return next((index for index in found if index is not None), None)


def _are_ids(value: Any, below: int) -> bool:
    ids = value if isinstance(value, list) else [value]
    return bool(ids) and all(type(item) is int and 0 <= item < below for item in ids)
