"""Fast encoding of text to ids: gigatoken if it gives the tokenizer's own ids, else the tokenizer itself."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers.normalizers import NFC

from megatron_qwen.data.text.long import LongText
from megatron_qwen.data.tokenizers.content import TokenizerContent
from megatron_qwen.data.tokenizers.end_token import end_token
from megatron_qwen.data.tokenizers.tokenizer import DocumentOptions, Tokenizer, load_tokenizer
from megatron_qwen.errors import DataError, Problem

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
        spelled: how often documents have spelled a control token, by its id; whoever counts empties it.
    """

    name: str
    vocab_size: int
    end_of_text: int
    spelled: Counter[int]

    def encode(self, text: str) -> Iterator[npt.NDArray[Any]]:
        """The ids of a text, in one or more pieces."""

    def encode_long(self, text: LongText) -> Iterator[npt.NDArray[Any]]:
        """The ids of a text that is too long for one string."""

    def ids(self, text: str, *, as_text: bool) -> npt.NDArray[np.int32]:
        """The ids of a text, in which control tokens are recognised, or text. They are not counted."""


class TokenizerEncoder:
    """Encodes with the tokenizer's own library, one text at a time.

    Args:
        tokenizer: the reference.
        why: why gigatoken is not used.
        options: what becomes of control tokens that a document spells.
    """

    def __init__(self, tokenizer: Tokenizer, why: str, options: DocumentOptions) -> None:
        self.tokenizer, self.name = tokenizer, f"the tokenizer's own library ({why})"
        self.vocab_size, self.end_of_text = tokenizer.vocab_size, tokenizer.end_of_text
        self.spelled: Counter[int] = Counter()
        self._control = _ControlIds(tokenizer.spellable)
        self._as_text = options.control_as_text

    def encode(self, text: str) -> Iterator[npt.NDArray[Any]]:
        """The ids of a text."""
        ids = np.asarray(self.tokenizer.encode_batch([text])[0], dtype=np.int32)
        if self._control.are_in(ids):
            self.spelled.update(self._control.of(ids))
            if self._as_text:
                ids = np.asarray(self.tokenizer.encode_batch([text], control_as_text=True)[0], dtype=np.int32)
                self._control.require_none(ids, text)
        yield ids

    def encode_long(self, text: LongText) -> Iterator[npt.NDArray[Any]]:
        """The ids of a long text, encoded whole: where it may be cut for this tokenizer is not known."""
        yield from self.encode(text.text())

    def ids(self, text: str, *, as_text: bool) -> npt.NDArray[np.int32]:
        """See ``Encoder``."""
        found = np.asarray(self.tokenizer.encode_batch([text], control_as_text=as_text)[0], dtype=np.int32)
        if as_text:
            self._control.require_none(found, text)
        return found


class GigatokenEncoder:
    """Encodes with gigatoken, on the calling thread.

    Args:
        directory: tokenizer directory.
        options: what ends a document, and what becomes of control tokens that it spells.

    Raises:
        ValueError: gigatoken does not support this kind of tokenizer.
    """

    def __init__(self, directory: Path, options: DocumentOptions) -> None:
        import gigatoken

        self.name, self._directory = "gigatoken", directory
        self._slow: Tokenizer | None = None
        self._plain: Any = None
        self._normal = NFC()
        self._added: tuple[str, ...] = ()
        self._content: TokenizerContent | None = None
        self._options, self._as_text = options, options.control_as_text
        self.spelled: Counter[int] = Counter()
        path = directory / "tokenizer.json"
        if path.is_file():
            content = self._content = TokenizerContent(path)
            self._library = gigatoken.Tokenizer.from_json(content.for_documents(control=True))
            self._cuts = _may_be_cut(content)
            self._normalizes = content.normalizer is not None
            self._control = _ControlIds(content.control)
            self._added = tuple(content.added_ids)
            self.end_of_text = end_token(directory, content.id_of, asked=options.end_token).id
        else:
            reference = load_tokenizer(directory, end=options.end_token)
            if reference.spellable:
                raise ValueError("a SentencePiece model with control tokens that a text can spell")
            self._library = gigatoken.Tokenizer.from_sentencepiece(directory / "tokenizer.model")
            self._cuts = self._normalizes = False
            self._control = _ControlIds({})
            self.end_of_text = reference.end_of_text
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

    def ids(self, text: str, *, as_text: bool) -> npt.NDArray[np.int32]:
        """See ``Encoder``."""
        found = self._encoded_as_text(text) if as_text else self._encoded(text)
        return found.view(np.int32) if found.dtype == np.uint32 else found.astype(np.int32)

    def _part(self, text: str) -> npt.NDArray[Any]:
        ids = self._encoded(text)
        if self._control.are_in(ids):
            self.spelled.update(self._control.of(ids))
            if self._as_text:
                return self._encoded_as_text(text)
        return ids

    def _encoded_as_text(self, text: str) -> npt.NDArray[Any]:
        """The ids of a text without control tokens, which gigatoken gives as well as the tokenizer's own library."""
        if self._normalizes and not _in_one_normal_form(text):
            ids = self._by_tokenizer(text, control_as_text=True)
        else:
            if self._plain is None:
                self._plain = self._without_control()
            ids = self._plain(text)
        self._control.require_none(ids, text)
        return ids

    def _without_control(self) -> Callable[[str], npt.NDArray[Any]]:
        import gigatoken

        assert self._content is not None
        try:
            found: Callable[[str], npt.NDArray[Any]] = gigatoken.Tokenizer.from_json(
                self._content.for_documents(control=False)
            ).encode
        except Exception:  # it supports the tokenizer, but not in this form
            return partial(self._by_tokenizer, control_as_text=True)
        return found

    def _encoded(self, text: str) -> npt.NDArray[Any]:
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
        if not any(name in line for name in self._added):
            normal = self._normal.normalize_str(line)
            if _in_one_normal_form(normal):
                return self._ids(normal)
        return self._by_tokenizer(line)

    def _by_tokenizer(self, text: str, *, control_as_text: bool = False) -> npt.NDArray[Any]:
        if self._slow is None:
            self._slow = load_tokenizer(self._directory, end=self._options.end_token)
        return np.asarray(self._slow.encode_batch([text], control_as_text=control_as_text)[0], dtype=np.uint32)


class _ControlIds:
    """Finds the ids of control tokens among the ids of a text.

    Args:
        names: ids by name.
    """

    def __init__(self, names: Mapping[str, int]) -> None:
        self._names = dict(names)
        self._ids = np.asarray(sorted(names.values()), dtype=np.int64)
        self._least = int(self._ids[0]) if len(self._ids) else 1 << 62

    def are_in(self, ids: npt.NDArray[Any]) -> bool:
        """Whether any is there. Control tokens have the largest ids of most vocabularies, so this is one maximum."""
        return len(ids) > 0 and int(ids.max()) >= self._least and bool(np.isin(ids, self._ids).any())

    def of(self, ids: npt.NDArray[Any]) -> list[int]:
        """Those that are there."""
        found: list[int] = ids[np.isin(ids, self._ids)].tolist()
        return found

    def require_none(self, ids: npt.NDArray[Any], text: str) -> None:
        """Raises DataError if any is there, as with a vocabulary that has them among its ordinary tokens."""
        if self.are_in(ids):
            names = [name for name, index in self._names.items() if index in ids]
            spelled = [name for name in names if name in text] or names
            fix = "cannot be encoded as text by this tokenizer; remove it from the documents, or give --control-tokens"
            raise DataError([Problem("--control-tokens", name, f"{fix} encode.") for name in spelled])


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


def open_encoder(directory: Path, options: DocumentOptions) -> Encoder:
    """gigatoken if it supports this tokenizer, else the tokenizer's own library. Not compared yet.

    Raises:
        DataError: there is no tokenizer, or not the token that is to end a document.
    """
    try:
        return GigatokenEncoder(directory, options)
    except DataError:
        raise
    except Exception as error:  # any other failure: the tokenizer's own library always works
        why = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        why = f"slower; gigatoken does not support it: {why}"
        return TokenizerEncoder(load_tokenizer(directory, end=options.end_token), why, options)


def probes(tokenizer: Tokenizer, *, control: bool) -> list[str]:
    """Texts that reveal differences between two implementations of a tokenizer, its added tokens among them.

    Args:
        tokenizer: the reference.
        control: whether texts that spell a control token are among them.
    """
    added = [f"a{name}b a {name} b{name}\n" for name in tokenizer.control_tokens]
    return [text for text in (*PROBES, *added) if control or not spells_control(text, tokenizer)]


def spells_control(text: str, tokenizer: Tokenizer) -> bool:
    """Whether a text contains the name of a control token."""
    return any(name in text for name in tokenizer.spellable)


def reference_ids(tokenizer: Tokenizer, texts: Sequence[str], options: DocumentOptions) -> list[list[int]]:
    """The ids of texts of documents, from the tokenizer's own library.

    A library that takes control tokens for text is made only if one is spelled: of 150,000 tokens it takes half a
    second.
    """
    ids = tokenizer.encode_batch(texts)
    control = set(tokenizer.spellable.values())  # a name may be spelled in another case, where the text is normalised
    spelled = [index for index, found in enumerate(ids) if not control.isdisjoint(found)]
    if options.control_as_text and spelled:
        as_text = tokenizer.encode_batch([texts[index] for index in spelled], control_as_text=True)
        for index, own in zip(spelled, as_text, strict=True):
            ids[index] = own
    return ids


def difference(encoder: Encoder, tokenizer: Tokenizer, texts: Sequence[str], options: DocumentOptions) -> str | None:
    """The first text for which an encoder gives other ids than the tokenizer; None if all are equal."""
    if (encoder.vocab_size, encoder.end_of_text) != (tokenizer.vocab_size, tokenizer.end_of_text):
        return f"the vocabulary: {encoder.vocab_size} ids for {tokenizer.vocab_size}"
    for text, ids in zip(texts, reference_ids(tokenizer, texts, options), strict=True):
        found = [int(number) for piece in encoder.encode(text) for number in piece]
        if found != ids:
            return text
    encoder.spelled.clear()  # by these texts
    return None


def cause(encoder: Encoder, tokenizer: Tokenizer, text: str, options: DocumentOptions) -> str:
    """What is different where an encoder gives other ids than the tokenizer, shown on as little text as possible.

    Args:
        encoder: the other implementation.
        tokenizer: the reference.
        text: for which they differ.
        options: how documents become ids.
    """

    def differ(one: str) -> bool:
        return difference(encoder, tokenizer, [one], options) is not None

    if not differ(text):  # the vocabulary itself
        return f"{encoder.name} gives other ids for {text[:60]!r}"
    while len(text) > 1:
        middle = len(text) // 2
        smaller = next((half for half in (text[:middle], text[middle:], text[1:], text[:-1]) if differ(half)), None)
        if smaller is None:
            break
        text = smaller
    theirs = [int(number) for piece in encoder.encode(text) for number in piece]
    (ours,) = reference_ids(tokenizer, [text], options)
    lossless = [name for name, ids in (("its", theirs), ("the tokenizer's", ours)) if tokenizer.decode(ids) == text]
    kept = f"; only {lossless[0]} ids give the text back" if len(lossless) == 1 else ""
    return f"{encoder.name} gives other ids for {text[:60]!r}: {theirs[:8]}, the tokenizer {ours[:8]}{kept}"


def _may_be_cut(content: TokenizerContent) -> bool:
    """Whether a text may be cut between a line end and a letter without changing its tokens."""
    return content.splits_like_qwen2() and not any(
        "\n" in token["content"] or token.get("lstrip") or token.get("rstrip") for token in content.added
    )
