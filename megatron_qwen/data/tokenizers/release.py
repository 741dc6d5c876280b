"""The tokenizer of a release, as others load it: its files, and the class of transformers that gives the run's ids.

transformers 5 builds a class of its own for a model type: for qwen2 always Qwen2's, whatever the files say
(MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS in models/auto/tokenization_auto.py). So what a loader gives is tried.
"""

import importlib.util
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from megatron_qwen.data.tokenizers.content import TokenizerContent
from megatron_qwen.data.tokenizers.encoder import PROBES
from megatron_qwen.data.tokenizers.sentencepiece_form import as_tokenizer_json
from megatron_qwen.data.tokenizers.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from megatron_qwen.errors import ConversionError, Problem

# In the order in which a user would try them; the second takes tokenizer.json as it is.
AUTO, AS_WRITTEN = "AutoTokenizer", "PreTrainedTokenizerFast"
NOT_TRIED = "transformers is not installed, or the tokenizer has no tokenizer.json"
_WORDS, _WORDS_A_TEXT = 4000, 40
_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class Loader:
    """How a released tokenizer is loaded.

    Args:
        name: class of transformers; None where nothing could be tried: transformers is not installed, or there is only
            a vocab.json, which nothing here reads.
        passed_over: why AutoTokenizer is not the one; None where it is.
    """

    name: str | None
    passed_over: str | None = None


def released_files(tokenizer: Path) -> dict[str, bytes]:
    """The tokenizer files of an export, by name: the run's own, and of a SentencePiece model a tokenizer.json.

    Raises:
        ConversionError: the model has no such form.
    """
    files = {name: (tokenizer / name).read_bytes() for name in TOKENIZER_FILES if (tokenizer / name).is_file()}
    if "tokenizer.model" in files and "tokenizer.json" not in files:
        files["tokenizer.json"] = as_tokenizer_json(tokenizer / "tokenizer.model").encode()
        # The classes for SentencePiece models have rules of their own beside the model's.
        try:
            content = json.loads(files.get(_CONFIG, b"{}"))
        except ValueError:
            raise ConversionError(Problem(str(tokenizer / _CONFIG), None, "is not valid JSON; fix it.")) from None
        files[_CONFIG] = (json.dumps({**content, "tokenizer_class": AS_WRITTEN}, indent=2) + "\n").encode()
    return files


class LoaderSearch:
    """Finds the class that loads an export's tokenizer so that it gives the ids of the run.

    Importing transformers takes seconds; it is done while the weights are written.

    Args:
        tokenizer: the run's tokenizer directory; None where it has none.
        config: config.json of the export.

    Raises:
        ConversionError: the tokenizer has no form that others load.
    """

    def __init__(self, tokenizer: Path | None, config: Mapping[str, Any]) -> None:
        self._tokenizer, self._config = tokenizer, dict(config)
        self.files = {} if tokenizer is None else released_files(tokenizer)
        possible = "tokenizer.json" in self.files and importlib.util.find_spec("transformers") is not None
        self._pool: ThreadPoolExecutor | None = None
        self._found: Future[tuple[Loader | None, list[Problem]]] | None = None
        self.expected = Loader(None)
        if possible:
            content = TokenizerContent(Path("tokenizer.json"), self.files["tokenizer.json"])
            # What transformers builds for the family is Qwen2's: it is confirmed while the weights are written.
            self.expected = Loader(AUTO) if content.splits_like_qwen2() else self._result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(self) -> None:
        """Starts to find out, if there is anything to confirm."""
        if self.expected.name is not None and self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
            self._found = self._pool.submit(_searched, self.files, self._config, self._tokenizer)

    def confirm(self) -> None:
        """Waits for it.

        Raises:
            ConversionError: no class of transformers gives the run's ids, or another than was expected.
        """
        if self.expected.name is not None and (found := self._result()) != self.expected:
            fix = f"cannot be released with this version of transformers: {found.passed_over}."
            raise ConversionError(Problem("data.tokenizer", self._tokenizer, fix))

    def _result(self) -> Loader:
        if self._found is None:
            loader, problems = _searched(self.files, self._config, self._tokenizer)
        else:
            loader, problems = self._found.result()
        if loader is None:
            raise ConversionError(problems)
        return loader


def _searched(
    files: Mapping[str, bytes], config: Mapping[str, Any], tokenizer: Path | None
) -> tuple[Loader | None, list[Problem]]:
    """The loader of files that are not written yet, or why there is none."""
    assert tokenizer is not None
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            (Path(folder) / "config.json").write_text(json.dumps(config))
            return loader_of(Path(folder), load_tokenizer(tokenizer), where=tokenizer), []
    except ConversionError as error:
        return None, list(error.problems)


def loader_of(directory: Path, reference: Tokenizer, *, where: Path) -> Loader:
    """The class that loads the tokenizer of a directory so that it gives a tokenizer's ids.

    Args:
        directory: with config.json and the tokenizer's files.
        reference: gives the ids of the run.
        where: what a message names.

    Raises:
        ConversionError: no class of transformers does.
    """
    faults: list[str] = []
    for name in (AUTO, AS_WRITTEN):
        if (fault := _fault(directory, name, reference)) is None:
            return Loader(name, faults[0] if faults else None)
        faults.append(fault)
    fix = f"cannot be released: transformers gives other ids than the run was trained on ({faults[-1]})."
    raise ConversionError(Problem("data.tokenizer", where, fix))


def _fault(directory: Path, name: str, reference: Tokenizer) -> str | None:
    """What is wrong with the tokenizer that a class loads; None if it gives the reference's ids and texts."""
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        loaded = getattr(transformers, name).from_pretrained(directory, local_files_only=True)
        return _difference(loaded, reference)
    except Exception as error:  # whatever others' files make transformers raise
        lines = str(error).splitlines()
        return f"{name} fails: {type(error).__name__}: {lines[0][:100] if lines else ''}"


def _difference(loaded: Any, reference: Tokenizer) -> str | None:
    texts = _texts(reference, loaded.get_added_vocab())
    for text, ids in zip(texts, reference.encode_batch(texts), strict=True):
        if (found := loaded.encode(text, add_special_tokens=False)) != ids:
            return f"{text[:40]!r} becomes {found[:6]} instead of {ids[:6]}"
        wanted = reference.decode(ids)
        if wanted == text and (told := loaded.decode(ids)) != text:
            return f"{text[:40]!r} is decoded to {told[:40]!r}"
    return None


def _texts(reference: Tokenizer, added: dict[str, int]) -> Sequence[str]:
    """Texts that tell tokenizers apart. A SentencePiece model takes no control token from a text, transformers does."""
    texts = [*PROBES, *_words(reference)]
    if reference.spellable:
        return [*texts, *(f"a{name} b{name}\n" for name in reference.control_tokens)]
    control = [*reference.control_tokens, *added]
    return [text for text in texts if not any(name in text for name in control)]


def _words(reference: Tokenizer) -> Iterator[str]:
    """Texts of the tokenizer's own tokens: where another splits a text before merging, some of them fall apart."""
    step = max(1, reference.vocab_size // _WORDS)
    for first in range(0, reference.vocab_size, step * _WORDS_A_TEXT):
        yield reference.decode(range(first, min(first + step * _WORDS_A_TEXT, reference.vocab_size), step))
    seen = 0
    for index in range(reference.vocab_size):
        word = reference.decode([index])
        if len(word) > 1 and word.strip().isdecimal():
            seen += 1
            yield f"{word} x{word}"
        if seen == _WORDS_A_TEXT:
            return
