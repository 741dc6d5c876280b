"""What a tokenizer.json says: the part that decides ids, and what others have left in it that does not."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from megatron_qwen.errors import DataError, Problem

# Qwen2's pre-tokenizer: words with their leading space, digits one by one, runs of punctuation, line ends.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Tokens that a text must not produce by spelling them, though the file does not call them special: Qwen2.5's of tools,
# fill-in-the-middle and repositories, Qwen3's of thinking (their tokenizer_config.json).
_CONTROL = frozenset(("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"))
# U+FDD0 is no character: Unicode keeps it for programs' own use, so that documents do not have it.
_NO_TEXT = "\ufdd0control token"
# Fields of a model, and what they are where a file leaves them out.
_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "dropout": (None, 0.0),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (None, False),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False),
}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class TokenizerContent:
    """A tokenizer.json.

    Args:
        path: the file.
        data: what is in it; None reads it.

    Raises:
        DataError: it is not a tokenizer.json.
    """

    def __init__(self, path: Path, data: bytes | None = None) -> None:
        self.path = path
        try:
            content = orjson.loads(path.read_bytes() if data is None else data)
            self.model: dict[str, Any] = content["model"]
            self.added: list[dict[str, Any]] = content.get("added_tokens") or []
            unknown = self.model.get("unk_token"), self.model.get("unk_id")
            self.control = {
                str(token["content"]): int(token["id"])
                for token in self.added
                if _is_control(token) and not _is_given_for_unknown(token, *unknown)
            }
            self.added_ids = {str(token["content"]): int(token["id"]) for token in self.added}
        except OSError as error:
            raise DataError(Problem(str(path), None, f"cannot be read ({error.strerror}).")) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"no field {error}" if isinstance(error, KeyError) else error
            raise DataError(Problem(str(path), None, f"is not a tokenizer ({why}).")) from None
        self._content: dict[str, Any] = content

    def id_of(self, token: str) -> int | None:
        """The id of a token; None if there is none."""
        if token in self.added_ids:
            return self.added_ids[token]
        vocabulary = self.model.get("vocab")
        if isinstance(vocabulary, list):  # of a Unigram model: pairs of a piece and its score
            return next((index for index, (piece, _) in enumerate(vocabulary) if piece == token), None)
        return None if vocabulary is None else vocabulary.get(token)

    @property
    def normalizer(self) -> dict[str, Any] | None:
        """The normaliser, or None."""
        found: dict[str, Any] | None = self._content.get("normalizer")
        return found

    @property
    def pre_tokenizer(self) -> dict[str, Any]:
        """The pre-tokenizer; empty if there is none."""
        return self._content.get("pre_tokenizer") or {}

    def splits_like_qwen2(self) -> bool:
        """Whether it normalises and splits text as Qwen2's tokenizer does."""
        normalizer = self.normalizer or {"type": "NFC"}
        parts = self.pre_tokenizer.get("pretokenizers", [])
        return (
            normalizer.get("type") == "NFC"
            and len(parts) == 2
            and parts[0].get("type") == "Split"
            and parts[0].get("pattern") == {"Regex": QWEN2_SPLIT}
            and parts[0].get("behavior") == "Isolated"
            and not parts[0].get("invert")
            and parts[1].get("type") == "ByteLevel"
        )

    def switched_off(self) -> list[str]:
        """What the file has that would change or cut documents, and that is not used on them; for people."""
        found = []
        if (truncation := self._content.get("truncation")) is not None:
            found.append(f"truncation to {truncation.get('max_length')} tokens")
        if (padding := self._content.get("padding")) is not None:
            strategy = padding.get("strategy")
            length = f" to {strategy['Fixed']} tokens" if isinstance(strategy, dict) and "Fixed" in strategy else ""
            found.append(f"padding{length}")
        if self.model.get("dropout"):
            found.append(f"dropout of merges ({self.model['dropout']:g})")
        return found

    def for_documents(self, *, control: bool) -> bytes:
        """As a tokenizer.json that encodes documents whole and always alike.

        Args:
            control: whether it recognises control tokens in a text.
        """
        content = {**self._content, "truncation": None, "padding": None, "post_processor": None}
        if self.model.get("dropout"):
            content["model"] = {**self.model, "dropout": None}
        if not control:
            content["added_tokens"] = list(self._without_control())
        return orjson.dumps(content)

    def _without_control(self) -> Iterator[dict[str, Any]]:
        """The added tokens, control tokens under names that no text spells: without them the others' ids would move."""
        for token in self.added:
            if token["content"] not in self.control:
                yield token
            elif not self._is_ordinary(token["content"]):
                yield {**token, "content": f"{_NO_TEXT} {token['id']}"}

    def _is_ordinary(self, token: str) -> bool:
        """Whether the model's own vocabulary has a token, so that its id is kept without the added one."""
        vocabulary = self.model.get("vocab")
        if isinstance(vocabulary, list):
            return any(piece == token for piece, _ in vocabulary)
        return vocabulary is not None and token in vocabulary

    def function_sha256(self) -> str:
        """SHA-256 of what decides the ids of a text: vocabulary, merges, normaliser, pre-tokenizer and added tokens.

        Equal for files that differ in layout, in the order of fields, in the form of merges, in fields that have their
        default, or in what has no part in it (truncation, padding, post-processor, decoder).
        """
        model = {
            name: value for name, value in self.model.items() if name not in _DEFAULTS or value not in _DEFAULTS[name]
        }
        model.pop("dropout", None)
        if isinstance(merges := model.get("merges"), list):
            model["merges"] = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else pair for pair in merges]
        added = [
            [token["id"], token["content"], *(bool(token.get(flag)) for flag in _FLAGS)]
            for token in sorted(self.added, key=lambda token: int(token["id"]))
        ]
        deciding = [model, self.normalizer, self.pre_tokenizer, added]
        return hashlib.sha256(orjson.dumps(deciding, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _is_given_for_unknown(token: Mapping[str, Any], name: object, index: object) -> bool:
    """Whether a model gives a token for what it lacks, so that a text has it without spelling it.

    Byte-level models lack nothing: some files name their <|endoftext|> as unknown token all the same.
    """
    return (token["content"] == name or token["id"] == index) and not token["content"].startswith("<|")


def _is_control(token: Mapping[str, Any]) -> bool:
    name = token["content"]
    return bool(token.get("special")) or name in _CONTROL or (name.startswith("<|") and name.endswith("|>"))
