"""Filters that judge a document by itself. Each returns the reason to drop it, or None."""

import importlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rapidfuzz.distance import LCSseq

from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer
from megatron_qwen.errors import ConfigError, DataError, Problem

_PARAGRAPHS = re.compile(r"\n\s*\n")


class Filter(Protocol):
    """A stage that judges one document at a time."""

    @property
    def name(self) -> str:
        """What the report calls it."""

    def reason(self, text: str) -> str | None:
        """Why the document is dropped; None keeps it."""


@dataclass(frozen=True)
class LengthAndCharacters:
    """Length in characters, and what they are.

    Args:
        min_characters: minimum length.
        max_characters: maximum length; None: no limit.
        min_letters: minimum share of letters.
        max_repetition: maximum share of lines that repeat an earlier line of the document.
    """

    min_characters: int = 0
    max_characters: int | None = None
    min_letters: float = 0.0
    max_repetition: float = 1.0
    name: str = "length and characters"

    def reason(self, text: str) -> str | None:
        """See ``Filter``."""
        if len(text) < self.min_characters:
            return f"{len(text)} characters"
        if self.max_characters is not None and len(text) > self.max_characters:
            return f"{len(text)} characters"
        if self.min_letters and (share := sum(map(str.isalpha, text)) / len(text)) < self.min_letters:
            return f"{100 * share:.0f} % letters"
        if self.max_repetition < 1:
            lines = [line for line in text.splitlines() if line.strip()]
            share = 1 - len(set(lines)) / max(len(lines), 1)
            if share > self.max_repetition:
                return f"{100 * share:.0f} % of its lines are repeated"
        return None


class Quality:
    """A score that the user's own classifier gives.

    Args:
        model: ``module:function`` of a callable that gives a text's score, or the path of a fastText model.
        label: of the fastText model, without ``__label__``; its probability is the score.
        least: lowest score that is kept.

    Raises:
        ConfigError: the classifier cannot be loaded.
    """

    name = "quality"

    def __init__(self, model: str, *, label: str | None, least: float) -> None:
        self.least = least
        self._score = _fasttext(model, label) if Path(model).is_file() else _callable(model)

    def reason(self, text: str) -> str | None:
        """See ``Filter``."""
        score = self._score(text)
        return f"score {score:.3f}" if score < self.least else None


def _fasttext(path: str, label: str | None) -> Callable[[str], float]:
    try:
        import fasttext

        model = fasttext.load_model(path)
    except ImportError:
        fix = "needs the fasttext library: pip install 'megatron_qwen[quality]'."
        raise ConfigError(Problem("--quality", path, fix)) from None
    except ValueError as error:
        raise ConfigError(Problem("--quality", path, f"is not a fastText model ({error}).")) from None
    known = [name.removeprefix("__label__") for name in model.get_labels()]
    if label not in known:
        raise ConfigError(Problem("--quality-label", label, f"is not a label of the model; it has {', '.join(known)}."))

    def score(text: str) -> float:
        # fastText reads one line.
        labels, values = model.predict(text.replace("\n", " "), k=len(known))
        return float(dict(zip(labels, values, strict=True)).get(f"__label__{label}", 0.0))

    return score


def _callable(name: str) -> Callable[[str], float]:
    module, _, function = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        fix = f"is neither a fastText model nor module:function ({error})."
        raise ConfigError(Problem("--quality", name, fix)) from None
    return lambda text: float(found(text))


class Contamination:
    """Test sets that must not be trained on, by the rule of the Qwen2.5 report (section 3.1).

    A sequence is part of a test when their longest common subsequence has at least 13 tokens and at least 0.6 of the
    shorter of the two.

    Args:
        tests: sequences of the test sets.
        tokenizer: directory of the tokenizer whose tokens are counted.
        whole: compare documents whole; else paragraph by paragraph, because a long document holds most of the tokens
            of any short test somewhere.
    """

    name = "contamination"
    least_tokens, least_share = 13, 0.6

    def __init__(self, tests: Sequence[str], *, tokenizer: Path, whole: bool) -> None:
        self._tokenizer, self._whole = load_tokenizer(tokenizer), whole
        tokens = self._tokenizer.encode_batch(list(tests))
        self._tests = [(text, ids) for text, ids in zip(tests, tokens, strict=True) if len(ids) >= self.least_tokens]
        if not self._tests:
            fix = f"has no sequence of {self.least_tokens} tokens or more."
            raise DataError(Problem("--test-set", None, fix))
        self._lengths = np.asarray([len(ids) for _, ids in self._tests])
        postings: dict[int, list[tuple[int, int]]] = {}
        for index, (_, ids) in enumerate(self._tests):
            for token, count in Counter(ids).items():
                postings.setdefault(token, []).append((index, count))
        # By token: the tests that have it, and how often.
        self._postings = {token: np.asarray(found).T for token, found in postings.items()}

    def reason(self, text: str) -> str | None:
        """See ``Filter``."""
        sequences = [text] if self._whole else [one for one in _PARAGRAPHS.split(text) if one.strip()]
        for ids in self._tokenizer.encode_batch(sequences):
            if len(ids) >= self.least_tokens and (test := self._match(ids)) is not None:
                return f"a test sequence: {test[:60]!r}"
        return None

    def _match(self, ids: list[int]) -> str | None:
        # A common subsequence cannot be longer than the number of common tokens, so few tests need the slow comparison.
        common = np.zeros(len(self._tests), dtype=np.int64)
        for token, count in Counter(ids).items():
            if token in self._postings:
                tests, counts = self._postings[token]
                common[tests] += np.minimum(counts, count)
        least = np.maximum(self.least_tokens, self.least_share * np.minimum(len(ids), self._lengths))
        for index in np.flatnonzero(common >= least):
            text, test = self._tests[index]
            if LCSseq.similarity(ids, test) >= least[index]:
                return text
        return None
