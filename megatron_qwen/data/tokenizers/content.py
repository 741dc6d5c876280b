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
            _require_forms(content)
            self.added: list[dict[str, Any]] = content.get("added_tokens") or []
            self.is_byte_level = self._is_byte_level(content)
            unknown = None if self.is_byte_level else (self.model.get("unk_token"), self.model.get("unk_id"))
            self.control = {
                str(token["content"]): int(token["id"])
                for token in self.added
                # What a model gives for what it lacks, a text has without spelling it.
                if _is_control(token) and (unknown is None or not {token["content"], token["id"]} & {*unknown})
            }
            self.added_ids = {str(token["content"]): int(token["id"]) for token in self.added}
        except OSError as error:
            raise DataError(Problem(str(path), None, f"cannot be read ({error.strerror}).")) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"no field {error}" if isinstance(error, KeyError) else error
            raise DataError(Problem(str(path), None, f"is not a tokenizer ({why}).")) from None
        self._content: dict[str, Any] = content

    @staticmethod
    def _is_byte_level(content: Mapping[str, Any]) -> bool:
        """Whether the model has a token for every byte, so that it lacks nothing."""
        found = content.get("pre_tokenizer") or {}
        parts = [found, *(found.get("pretokenizers") or [])]
        return any(part.get("type") == "ByteLevel" for part in parts)

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
            content["model"], content["added_tokens"] = self._without_control(content.get("model", self.model))
        return orjson.dumps(content)

    def _without_control(self, model: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The model and the added tokens, control tokens under names that no text spells.

        Without them the others' ids would move. A token that merges make stays in a byte-pair model: a text that
        spells it may become that id, which whoever encodes has to look for.
        """
        merged = {"".join(pair) for pair in _pairs(model.get("merges"))}
        other = {name: f"{_NO_TEXT} {index}" for name, index in self.control.items() if name not in merged}
        vocabulary = model["vocab"]
        if isinstance(vocabulary, list):
            renamed: Any = [[other.get(piece, piece), score] for piece, score in vocabulary]
        else:
            renamed = {other.get(name, name): index for name, index in vocabulary.items()}
        added = [
            {**token, "content": other.get(token["content"], token["content"])}
            for token in self.added
            if token["content"] not in self.control or token["content"] in other
        ]
        return {**model, "vocab": renamed}, added

    def function_sha256(self) -> str:
        """SHA-256 of what decides the ids of a text: vocabulary, merges, normaliser, pre-tokenizer and added tokens.

        Equal for files that differ in layout, in the order of fields, in the form of merges, in fields that have their
        default, or in what has no part in it (truncation, padding, post-processor, decoder).
        """
        model = {
            name: value for name, value in self.model.items() if name not in _DEFAULTS or value not in _DEFAULTS[name]
        }
        model.pop("dropout", None)
        model.setdefault("type", _kind_of(model))  # older files leave it out
        if "merges" in model:
            model["merges"] = list(_pairs(model["merges"]))
        added = [
            [token["id"], token["content"], *(bool(token.get(flag)) for flag in _FLAGS)]
            for token in sorted(self.added, key=lambda token: int(token["id"]))
        ]
        deciding = [model, self.normalizer, _spelled_out(self.pre_tokenizer), added]
        return hashlib.sha256(orjson.dumps(deciding, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _pairs(merges: Any) -> Iterator[list[str]]:
    """The merges of a model, in either form: ``"a b"`` or ``["a", "b"]``."""
    for pair in merges or ():
        yield pair.split(" ", 1) if isinstance(pair, str) else pair


def _kind_of(model: Mapping[str, Any]) -> str:
    """The type of a model by its fields, as the library tells them apart."""
    if "merges" in model:
        return "BPE"
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def _spelled_out(part: Any) -> Any:
    """A pre-tokenizer with what older files leave to a default, as the library writes it today."""
    if isinstance(part, list):
        return [_spelled_out(item) for item in part]
    if not isinstance(part, dict):
        return part
    found = {name: _spelled_out(value) for name, value in part.items()}
    if found.get("type") == "ByteLevel":
        found.setdefault("use_regex", True)
    if found.get("type") == "Punctuation":
        found.setdefault("behavior", "Isolated")
    if found.get("type") == "Metaspace":
        prefixed = found.pop("add_prefix_space", True)
        found.pop("str_rep", None)
        found.setdefault("prepend_scheme", "always" if prefixed else "never")
        found.setdefault("split", True)
    return found


def _require_forms(content: Mapping[str, Any]) -> None:
    """Raises TypeError where a field is not of the kind that it is in every tokenizer.json."""
    vocabulary = content["model"].get("vocab")
    pairs = vocabulary if isinstance(vocabulary, list) else []
    if not isinstance(vocabulary, dict | list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise TypeError("model.vocab is no vocabulary")
    for name in ("truncation", "padding", "normalizer", "pre_tokenizer"):
        if not isinstance(content.get(name), dict | None):
            raise TypeError(f"{name} is no object")


def _is_control(token: Mapping[str, Any]) -> bool:
    return bool(token.get("special")) or names_control(token["content"])


def names_control(token: str) -> bool:
    """Whether a token is one of control by its name."""
    return token in _CONTROL or (token.startswith("<|") and token.endswith("|>"))
