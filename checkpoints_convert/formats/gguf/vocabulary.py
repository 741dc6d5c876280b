"""A tokenizer as keys of a GGUF file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_convert.formats.gguf.byte_level_vocabulary import byte_level_tokens, is_byte_level
from checkpoints_convert.formats.gguf.container import Value, ValueType, text, uint32
from checkpoints_convert.formats.gguf.sentencepiece_vocabulary import sentencepiece_tokens
from checkpoints_convert.formats.gguf.tokens import Tokens, TokenType
from megatron_qwen.data.tokenizers.content import TokenizerContent
from megatron_qwen.errors import ConversionError, DataError, Problem

_JSON, _MODEL, _CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
_PREFIX = "tokenizer.ggml."


def tokenizer_keys(
    directory: Path, config: Mapping[str, Any], *, vocab_size: int, eos: int | None = None
) -> dict[str, Value]:
    """The keys of a tokenizer.

    Args:
        directory: of the tokenizer.
        config: config.json of the model, whose bos, eos and pad ids are taken where the tokenizer names none.
        vocab_size: rows of the embedding; those without a token get names of their own.
        eos: id that ends what the model writes, where it is not what the tokenizer's files say.

    Raises:
        ConversionError: llama.cpp has no tokenizer that gives its ids.
    """
    try:
        tokens = _tokens(directory)
    except DataError as error:
        raise ConversionError(error.problems) from None
    names, types, scores = [*tokens.names], [*tokens.types], [*tokens.scores]
    if len(names) > vocab_size:
        fix = f"has ids up to {len(names) - 1:,}, and the model {vocab_size:,} rows; name the model's own tokenizer."
        raise ConversionError(Problem(str(directory), None, fix))
    taken = set(names)
    for index, name in enumerate(names):
        names[index] = name or _unused(index, taken)
    for index in range(len(names), vocab_size):
        names.append(_unused(index, taken))
        types.append(TokenType.UNUSED)
        scores.append(0.0)
    found = {
        f"{_PREFIX}model": text(tokens.model),
        f"{_PREFIX}pre": text(tokens.pre),
        f"{_PREFIX}tokens": Value(ValueType.STRING, names),
        f"{_PREFIX}token_type": Value(ValueType.INT32, [int(item) for item in types]),
    }
    if tokens.scores:
        found[f"{_PREFIX}scores"] = Value(ValueType.FLOAT32, scores)
    if tokens.merges:
        found[f"{_PREFIX}merges"] = Value(ValueType.STRING, tokens.merges)
    found |= {f"{_PREFIX}{key}": value for key, value in tokens.more.items()}
    special = _special_ids(directory, names, config) | ({} if eos is None else {"eos": eos})
    for key, index in special.items():
        found[f"{_PREFIX}{key}_token_id"] = uint32(index)
    for key in ("add_bos_token", "add_eos_token"):
        found[f"{_PREFIX}{key}"] = Value(ValueType.BOOL, False)
    if (template := _chat_template(directory)) is not None:
        found["tokenizer.chat_template"] = text(template)
    return found


def _tokens(directory: Path) -> Tokens:
    if (directory / _JSON).is_file():
        content = TokenizerContent(directory / _JSON)
        if is_byte_level(content):
            return byte_level_tokens(content)
        if not (directory / _MODEL).is_file():
            fix = "is neither a byte-level BPE nor next to a SentencePiece model: llama.cpp has no such tokenizer."
            raise ConversionError(Problem(str(directory / _JSON), str(content.model.get("type")), fix))
    if (directory / _MODEL).is_file():
        return sentencepiece_tokens(directory / _MODEL)
    fix = f"holds neither {_JSON} nor {_MODEL}; a GGUF file has its tokenizer inside. Name one (--tokenizer)."
    raise ConversionError(Problem(str(directory), None, fix))


def _unused(index: int, taken: set[str]) -> str:
    """Name of a row without a token, as llama.cpp's converter gives it; names must differ."""
    name = f"[PAD{index}]"
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _special_ids(directory: Path, names: list[str], config: Mapping[str, Any]) -> dict[str, int]:
    """Ids of the tokens that begin and end a text and that pad: the tokenizer's, else those of config.json."""
    ids = {name: index for index, name in enumerate(names)}
    named = _json(directory / _CONFIG)
    found: dict[str, int] = {}
    for key, field in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        token = named.get(f"{field}_token")
        token = token.get("content") if isinstance(token, dict) else token
        index = ids.get(token) if isinstance(token, str) else None
        if index is None:
            stated = config.get(f"{field}_token_id")
            stated = stated[0] if isinstance(stated, list) and stated else stated
            index = stated if isinstance(stated, int) and 0 <= stated < len(names) else None
        if index is not None:
            found[key] = index
    return found


def _chat_template(directory: Path) -> str | None:
    """The template of a conversation, from wherever the versions of transformers keep it."""
    if (path := directory / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", _CONFIG):
        template = _json(directory / name).get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
            template = named.get("default")
        if isinstance(template, str) and template:
            return template
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ConversionError(Problem(str(path), None, "is not a JSON object; fix it."))
    return content
