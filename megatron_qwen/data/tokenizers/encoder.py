"""Fast encoding of text to ids: gigatoken if it gives the tokenizer's own ids, else the tokenizer itself."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import orjson
from tokenizers.normalizers import NFC

from megatron_qwen.data.text.long import LongText
from megatron_qwen.data.tokenizers.making import QWEN2_SPLIT
from megatron_qwen.data.tokenizers.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer

# Texts that reveal differences between two implementations of a tokenizer: control tokens, digits, spaces, line ends,
# composed and decomposed letters, scripts without spaces, emoji with joiners, replacement and control characters,
# contractions.
PROBES = (
    "def f(x, *, y: int = 10_000) -> str:\n    return f'{x!r:>12}'  # it's\n\n\n",
    "for (int i = 0; i < n; ++i) {\r\n\ta[i] += b[i] ** 2;\r\n}\r\n",
    "The year 2024's 1,234,567.89 and 3.14e-10; I'll we've DON'T can't\u2019t.",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u4e2d\u6587\u548c English \u6df7\u5408 123\u3002",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3001\ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea \u0939\u093f\u0928\u094d\u0926\u0940",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0663\u0664 \u2167 \u00bd",
    "e\u0301 \u00e9 A\u030a \u212b \u1e9b\u0323 \uac00 \u1100\u1161 \ufb01 q\u0307\u0323 q\u0323\u0307",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\U0001d573 \U000e0001 \ufffd\ufffd \u0000 \u001b[0m",
    *(" leading", "  two", "trailing  ", "\t\ttabs\t", " \n \n\n  \n", "\u00a0\u2003\u3000\u2028\u2029\u0085x"),
    *("a\u200bb\ufeffc", "<|endoftext|>", "a<|im_start|>user\nb<|im_end|>\n<|endoftext|> <|endoftext"),
    "<tool_call>{}</tool_call><|fim_prefix|>x",
    '$$\\int_0^\\infty e^{-x^2} dx$$ <p class="a">&amp;</p> ---- ==== ....',
    *("a" * 80, "0" * 70, " " * 130 + "x", "\n" * 70, "x", "", "\ud55c"),
    "\u00ff\u0100\u07ff\u0800\uffff\U00010000\U0010ffff",
)
# A longer document is encoded in parts, cut where Qwen2's pre-tokenizer always cuts: between a line end and a letter.
_PART_CHARACTERS = 1 << 20
_CUT = re.compile(r"\n(?=[A-Za-z])")
# tokenizers and gigatoken implement Unicode's normal form C (NFC) with tables of different Unicode versions. They
# differ on text that is not in NFC, and on the scripts with compositions since Unicode 16, which Python's own tables
# may lack (given here by the first bytes of their UTF-8: U+11380 to U+113FF, U+16100 to U+1613F, U+16D40 to U+16D7F).
# The tokenizer's own library encodes such text.
_RECENT = (b"\xf0\x91\x8e", b"\xf0\x91\x8f", b"\xf0\x96\x84", b"\xf0\x96\xb5")


class Encoder(Protocol):
    """Text to ids.

    Args:
        name: for messages and the manifest.
        vocab_size: one more than the largest id.
        end_of_text: id that ends a document.
    """

    name: str
    vocab_size: int
    end_of_text: int

    def encode(self, text: str) -> Iterator[npt.NDArray[Any]]:
        """The ids of a text, in one or more pieces."""

    def encode_long(self, text: LongText) -> Iterator[npt.NDArray[Any]]:
        """The ids of a text that is too long for one string."""


class TokenizerEncoder:
    """Encodes with the tokenizer's own library, one text at a time.

    Args:
        tokenizer: the reference.
        why: why gigatoken is not used.
    """

    def __init__(self, tokenizer: Tokenizer, why: str) -> None:
        self.tokenizer, self.name = tokenizer, f"the tokenizer's own library ({why})"
        self.vocab_size, self.end_of_text = tokenizer.vocab_size, tokenizer.end_of_text

    def encode(self, text: str) -> Iterator[npt.NDArray[Any]]:
        """The ids of a text."""
        yield np.asarray(self.tokenizer.encode_batch([text])[0], dtype=np.int32)

    def encode_long(self, text: LongText) -> Iterator[npt.NDArray[Any]]:
        """The ids of a long text, encoded whole: where it may be cut for this tokenizer is not known."""
        yield from self.encode(text.text())


class GigatokenEncoder:
    """Encodes with gigatoken, on the calling thread.

    Args:
        directory: tokenizer directory.

    Raises:
        ValueError: gigatoken does not support this kind of tokenizer.
    """

    def __init__(self, directory: Path) -> None:
        import gigatoken

        self.name, self._directory = "gigatoken", directory
        self._slow: Tokenizer | None = None
        self._normal = NFC()
        self._control: tuple[str, ...] = ()
        path = directory / "tokenizer.json"
        if path.is_file():
            data = path.read_bytes()
            content = orjson.loads(data)
            self._library = gigatoken.Tokenizer.from_json(data)
            self._cuts = _splits_like_qwen2(content)
            self._normalizes = content.get("normalizer") is not None
            control = {token["content"]: int(token["id"]) for token in content["added_tokens"]}
            self.end_of_text = control[END_OF_TEXT]
            self._control = tuple(control)
        else:
            self._library = gigatoken.Tokenizer.from_sentencepiece(directory / "tokenizer.model")
            self._cuts = self._normalizes = False
            self.end_of_text = load_tokenizer(directory).end_of_text
        self.vocab_size = int(self._library.vocab_size)

    def encode(self, text: str) -> Iterator[npt.NDArray[Any]]:
        """The ids of a text. A long text is encoded in parts, which bounds the memory."""
        start = 0
        while (
            self._cuts
            and len(text) - start > _PART_CHARACTERS
            and (cut := _CUT.search(text, start + _PART_CHARACTERS)) is not None
        ):
            yield self._part(text[start : cut.end()])
            start = cut.end()
        yield self._part(text[start:] if start else text)

    def encode_long(self, text: LongText) -> Iterator[npt.NDArray[Any]]:
        """The ids of a long text, part by part if it may be cut for this tokenizer."""
        if not self._cuts:
            yield from self.encode(text.text())
            return
        for part in text.parts():
            yield self._part(part)

    def _part(self, text: str) -> npt.NDArray[Any]:
        if not self._normalizes or _in_one_normal_form(text):
            return self._ids(text)
        if not self._cuts:
            return self._by_tokenizer(text)
        # Only the lines that are not in NFC take the slow path.
        found: list[npt.NDArray[Any]] = []
        held = ""
        for line in _lines(text):
            if _in_one_normal_form(line):
                held += line
                continue
            found += [self._ids(held), self._unusual(line)]
            held = ""
        return np.concatenate([*found, self._ids(held)])

    def _ids(self, text: str) -> npt.NDArray[Any]:
        ids: npt.NDArray[Any] = self._library.encode(text)  # gigatoken has no types
        return ids

    def _unusual(self, line: str) -> npt.NDArray[Any]:
        """The ids of a line that is not in NFC, or uses scripts of recent Unicode versions."""
        if not any(name in line for name in self._control):
            normal = self._normal.normalize_str(line)
            if _in_one_normal_form(normal):
                return self._ids(normal)
        return self._by_tokenizer(line)

    def _by_tokenizer(self, text: str) -> npt.NDArray[Any]:
        if self._slow is None:
            self._slow = load_tokenizer(self._directory)
        return np.asarray(self._slow.encode_batch([text])[0], dtype=np.uint32)


def _lines(text: str) -> Iterator[str]:
    """The text, cut at every place where that does not change its tokens."""
    start = 0
    for cut in _CUT.finditer(text):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def _in_one_normal_form(text: str) -> bool:
    """Whether a text is in normal form C by the tables of every Unicode version."""
    if text.isascii():
        return True
    raw = text.encode()
    return not any(first in raw for first in _RECENT) and unicodedata.is_normalized("NFC", text)


def open_encoder(directory: Path) -> Encoder:
    """gigatoken if it supports this tokenizer, else the tokenizer's own library. Not compared yet."""
    try:
        return GigatokenEncoder(directory)
    except Exception as error:  # any failure: the tokenizer's own library always works
        why = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        return TokenizerEncoder(load_tokenizer(directory), f"slower; gigatoken does not support it: {why}")


def difference(encoder: Encoder, tokenizer: Tokenizer, texts: Sequence[str]) -> str | None:
    """The first text for which an encoder gives other ids than the tokenizer; None if all are equal."""
    if (encoder.vocab_size, encoder.end_of_text) != (tokenizer.vocab_size, tokenizer.end_of_text):
        return f"the vocabulary: {encoder.vocab_size} ids for {tokenizer.vocab_size}"
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        found = [int(number) for piece in encoder.encode(text) for number in piece]
        if found != ids:
            return text
    return None


def _splits_like_qwen2(content: dict[str, Any]) -> bool:
    pre = content.get("pre_tokenizer") or {}
    normalizer = content.get("normalizer") or {"type": "NFC"}
    parts = pre.get("pretokenizers", [])
    return (
        normalizer.get("type") == "NFC"
        and len(parts) == 2
        and parts[0].get("type") == "Split"
        and parts[0].get("pattern") == {"Regex": QWEN2_SPLIT}
        and parts[0].get("behavior") == "Isolated"
        and not parts[0].get("invert")
        and parts[1].get("type") == "ByteLevel"
        and not any(
            "\n" in token["content"] or token["lstrip"] or token["rstrip"] for token in content.get("added_tokens", [])
        )
    )
