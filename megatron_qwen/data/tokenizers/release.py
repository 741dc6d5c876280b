"""The tokenizer of a release, as others load it: its files, and the class of transformers that gives the run's ids.

transformers 5 builds a class of its own for a model type: for qwen2 always Qwen2's, whatever the files say
(MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS in models/auto/tokenization_auto.py). So what a loader gives is tried.
"""

import importlib.util
import json
import re
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
from megatron_qwen.errors import ConversionError, DataError, Problem
from megatron_qwen.hf import library

# In the order in which a user would try them; the second takes tokenizer.json as it is.
AUTO, AS_WRITTEN = "AutoTokenizer", "PreTrainedTokenizerFast"
NOT_TRIED = "transformers is not installed, or the tokenizer has no tokenizer.json"
_WORDS, _WORDS_A_TEXT = 4000, 40
# Classes, without the "Fast" of older names, with which transformers gives a Qwen2 model the tokenizer of its files.
_QWEN2S = ("Qwen2Tokenizer", "PreTrainedTokenizer", "TokenizersBackend")
_IDS_SHOWN, _LETTERS_SHOWN = 6, 40
_CONFIG, _JSON = "tokenizer_config.json", "tokenizer.json"
# A file whose vocabulary has the token "dropout" has such a pair, too: whether it is the model's is read then.
_MAY_HAVE_DROPOUT = re.compile(rb'"dropout"\s*:\s*[0-9.]')


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
    if _JSON in files:
        files[_JSON] = without_dropout(files[_JSON])
    if "tokenizer.model" in files and _JSON not in files:
        files[_JSON] = as_tokenizer_json(tokenizer / "tokenizer.model").encode()
        # The classes for SentencePiece models have rules of their own beside the model's.
        try:
            content = json.loads(files.get(_CONFIG, b"{}"))
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise ConversionError(Problem(str(tokenizer / _CONFIG), None, "is not a JSON object; fix it."))
        files[_CONFIG] = (json.dumps({**content, "tokenizer_class": AS_WRITTEN}, indent=2) + "\n").encode()
    return files


def without_dropout(data: bytes) -> bytes:
    """A tokenizer.json as data preparation uses it: with dropout of merges, an export's ids would differ from call to
    call and from those that the run was trained on. The same bytes where the file has none.
    """
    if _MAY_HAVE_DROPOUT.search(data) is None:
        return data
    try:
        content = json.loads(data)
        if not content["model"].get("dropout"):
            return data
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return data  # not a tokenizer; whoever loads it says so
    content["model"]["dropout"] = None
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


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
        possible = _JSON in self.files and importlib.util.find_spec("transformers") is not None
        self._pool: ThreadPoolExecutor | None = None
        self._found: Future[Loader] | None = None
        self.expected = Loader(None)
        if possible:
            self.expected = Loader(AUTO) if self._is_qwen2s() else self._search()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(self) -> None:
        """Starts to find out, if there is anything to confirm."""
        if self.expected.name is not None and self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
            self._found = self._pool.submit(self._search)

    def confirm(self) -> Loader:
        """Waits for it, and returns the class that was found, which may be another than was expected.

        Raises:
            ConversionError: no class of transformers gives the run's ids.
            DataError: the tokenizer cannot be loaded.
        """
        if self.expected.name is None:
            return self.expected
        return self._search() if self._found is None else self._found.result()

    def _is_qwen2s(self) -> bool:
        """Whether it is what transformers builds for the family, so that weights may be written while it is tried.

        A file without a normalizer leaves text as it is, where Qwen2's class composes letters and marks (NFC). A
        tokenizer_config.json that names another class gets that one for some model types.
        """
        content = TokenizerContent(Path(_JSON), self.files[_JSON])
        try:
            told = json.loads(self.files.get(_CONFIG, b"{}"))
        except ValueError:
            return False
        class_ = told.get("tokenizer_class") if isinstance(told, dict) else None
        named = class_ is None or str(class_).removesuffix("Fast") in _QWEN2S
        return named and content.normalizer is not None and content.splits_like_qwen2()

    def _search(self) -> Loader:
        """The loader of files that are not written yet."""
        assert self._tokenizer is not None
        with tempfile.TemporaryDirectory() as folder:
            for name, content in self.files.items():
                (Path(folder) / name).write_bytes(content)
            (Path(folder) / "config.json").write_text(json.dumps(self._config))
            return loader_of(
                Path(folder),
                load_tokenizer(self._tokenizer),
                where=self._tokenizer,
                refusal="cannot be released, because no class of transformers gives what the run was trained on",
                way_out="Name a tokenizer that one of them loads with the same ids (--tokenizer), or use another "
                "version of transformers.",
            )


def loader_of(directory: Path, reference: Tokenizer, *, where: Path, refusal: str, way_out: str) -> Loader:
    """The class that loads the tokenizer of a directory so that it gives a tokenizer's ids.

    Args:
        directory: with config.json and the tokenizer's files.
        reference: gives the ids of the run.
        where: what a message names.
        refusal: how the message begins where there is no such class: what cannot be done.
        way_out: how it ends.

    Raises:
        ConversionError: no class of transformers does.
    """
    if not (directory / _JSON).is_file():
        return Loader(None)
    try:
        transformers = library.transformers()
    except ImportError:
        return Loader(None)
    transformers.logging.set_verbosity_error()
    faults: list[str] = []
    for name in (AUTO, AS_WRITTEN):
        if (fault := _fault(directory, name, reference)) is None:
            return Loader(name, faults[0] if faults else None)
        faults.append(fault)
    raise ConversionError(Problem(str(where), None, f"{refusal}: {'; '.join(faults)}. {way_out}".strip()))


def load_with(name: str, directory: Path) -> Any:
    """A tokenizer as a class of transformers loads it, without dropout, which data preparation does not have either."""
    loaded = getattr(library.transformers(), name).from_pretrained(directory, local_files_only=True)
    model: Any = getattr(getattr(loaded, "backend_tokenizer", None), "model", None)
    if getattr(model, "dropout", None):
        model.dropout = None
    return loaded


def _fault(directory: Path, name: str, reference: Tokenizer) -> str | None:
    """What is wrong with the tokenizer that a class loads; None if it gives the reference's ids and texts."""
    try:
        loaded = load_with(name, directory)
    except Exception as error:  # whatever others' files make transformers raise
        return f"{name} cannot load it ({_first_line(error)})"
    try:
        difference = _difference(loaded, reference)
    except DataError:  # of the reference, which is no fault of the class
        raise
    except Exception as error:
        return f"{name} loads it and cannot encode with it ({_first_line(error)})"
    return None if difference is None else f"{name} {difference}"


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:100] if lines else ''}"


def _difference(loaded: Any, reference: Tokenizer) -> str | None:
    """How the ids of texts differ, or the texts of equal ids, from where they begin to."""
    texts = _texts(reference, loaded.get_added_vocab())
    for text, ids in zip(texts, reference.encode_batch(texts), strict=True):
        if (found := list(loaded.encode(text, add_special_tokens=False))) != ids:
            at = _first_difference(found, ids)
            part = reference.decode(ids[at : at + _IDS_SHOWN])
            theirs, ours = found[at : at + _IDS_SHOWN], ids[at : at + _IDS_SHOWN]
            return f"gives other ids (from id {at:,} of a text on, at {part!r}: {theirs} instead of {ours})"
        wanted = reference.decode(ids)
        if wanted == text and (told := loaded.decode(ids)) != text:
            at = _first_difference(told, text)
            shown = slice(at, at + _LETTERS_SHOWN)
            return f"gives the same ids and decodes them to another text ({told[shown]!r} instead of {text[shown]!r})"
    return None


def _first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


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
