"""Samples that a model is calibrated on: windows of token ids from a run's data, token files, texts or chats."""

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson
import torch
import xxhash

from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.reading.replay import Replay
from megatron_qwen.data.text.blocks import ReadOptions
from megatron_qwen.data.text.formats import FileFormat, InputFile
from megatron_qwen.data.text.inputs import find_inputs
from megatron_qwen.data.text.records import documents
from megatron_qwen.data.text.unpack import unpacked
from megatron_qwen.data.token_files.token_set import TokenSet
from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer
from megatron_qwen.errors import DataError, Problem
from megatron_qwen.hf import library

# Of texts, this many times the tokens that are needed are read, from the first on, and windows chosen among them.
_READ = 8
_BATCH = 256  # texts that are encoded at a time
_MORE = 4  # times as many samples of a run are chosen where those before were not enough


@dataclass(frozen=True)
class SampleChoice:
    """Which samples are taken.

    Args:
        count: how many.
        length: tokens of each.
        seed: of the choice.
    """

    count: int = 512
    length: int = 2048
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return self.count * self.length


@dataclass(frozen=True)
class Samples:
    """Calibration data.

    Args:
        ids: int64 [count, length].
        origin: where they come from, for people.
    """

    ids: torch.Tensor
    origin: str

    @cached_property
    def digest(self) -> str:
        """xxh3-128 of shape and ids."""
        found = xxhash.xxh3_128(str(tuple(self.ids.shape)).encode())
        found.update(memoryview(self.ids.contiguous().view(-1).view(torch.uint8).numpy()))
        return found.hexdigest()

    def require_vocabulary(self, size: int) -> None:
        """Raises DataError if an id is not one of a model's."""
        if (largest := int(self.ids.max())) >= size or int(self.ids.min()) < 0:
            fix = f"is not among the {size:,} ids of the model: the data were made with another tokenizer."
            raise DataError(Problem(self.origin, largest, fix))


def from_token_files(prefix: str | Path, choice: SampleChoice) -> Samples:
    """Windows of a token file, or of a set of shards, chosen at random without repetition.

    Raises:
        DataError: files are missing or damaged, or have too few tokens.
    """
    tokens = TokenSet(prefix)
    _require(tokens.num_tokens, choice, where=str(prefix), what="the token files hold")
    windows = _chosen(tokens.num_tokens // choice.length, choice)
    rows = [torch.from_numpy(tokens.tokens(at * choice.length, (at + 1) * choice.length)) for at in windows]
    return Samples(torch.stack(rows), str(prefix))


def from_run(config: RunConfig, ledger: Mapping[str, Any] | None, choice: SampleChoice) -> Samples:
    """Samples that a run has read, chosen at random over all of its phases: its own mix of sources.

    Samples of another length than ``choice.length`` are joined in the order chosen and cut.

    Args:
        config: of the run.
        ledger: as its checkpoint notes it (``data`` of its state); None where it has none.
        choice: which samples.

    Raises:
        DataError: there is no ledger, token files are missing or are not those that the run has read, or it has read
            too few tokens.
    """
    if ledger is None or not ledger.get("phases"):
        fix = "the checkpoint does not say what the run has read; name texts, chats or token files to calibrate on."
        raise DataError(Problem("calibration", None, fix))
    replay = Replay(config, ledger)
    consumed = sum(entry.samples for entry in replay.entries)
    shortest = min(entry.seq_length for entry in replay.entries)
    shown = min(consumed, -(-choice.tokens // shortest))
    found, left = _joined(replay, consumed, shown, choice)
    while left > 0 and shown < consumed:  # samples with padding: choose among more of them
        shown = min(consumed, _MORE * shown)
        found, left = _joined(replay, consumed, shown, choice)
    _require(choice.tokens - left, choice, where="calibration", what="the run has read")
    return Samples(torch.cat(found)[: choice.tokens].view(choice.count, choice.length), "the run's own data")


def _joined(replay: Replay, consumed: int, shown: int, choice: SampleChoice) -> tuple[list[torch.Tensor], int]:
    """Tokens of at most ``shown`` samples, and how many tokens are missing then."""
    found, left = [], choice.tokens
    for number in random.Random(choice.seed).sample(range(consumed), shown):
        _, _, sample = replay[number]
        found.append(torch.from_numpy(sample.tokens[: len(sample.tokens) - sample.padding]))
        left -= len(found[-1])
        if left <= 0:
            break
    return found, left


def from_texts(
    names: Sequence[str | Path], tokenizer: Path, choice: SampleChoice, *, text_field: str = "text"
) -> Samples:
    """Windows of documents, each ended as data are prepared, chosen at random among the first that are read.

    Args:
        names: files, folders, patterns or lists of them: text, JSON lines, Parquet, plain or compressed.
        tokenizer: directory of the model's tokenizer.
        choice: which windows.
        text_field: field of the text in JSON lines, or column in Parquet.

    Raises:
        DataError: a name, a file or a record is wrong, there is no tokenizer, or there are too few tokens.
    """
    files = find_inputs(names, text_field=text_field).files
    encoder = load_tokenizer(tokenizer)
    end = encoder.end_of_text

    def ids() -> Iterator[list[int]]:
        for texts in itertools.batched(documents(files, ReadOptions(field=text_field)), _BATCH):
            yield from ([*one, end] for one in encoder.encode_batch(list(texts), control_as_text=True))

    return _windows(ids(), choice, where=_named(files))


def from_chats(names: Sequence[str | Path], tokenizer: Path, choice: SampleChoice) -> Samples:
    """Windows of conversations in the tokenizer's chat template, chosen at random among the first that are read.

    Args:
        names: files, folders, patterns or lists of them: JSON lines, plain or compressed, with ``messages``: a list of
            {"role": ..., "content": ...}.
        tokenizer: directory of the model's tokenizer, with its chat template.
        choice: which windows.

    Raises:
        DataError: a name, a file or a record is wrong, the tokenizer has no chat template, transformers is not
            installed, or there are too few tokens.
    """
    files = find_inputs(names, text_field="messages").files
    others = [file for file in files if file.format is not FileFormat.JSONL]
    if others:
        fix = "is not JSON lines; conversations are read from JSON lines with messages."
        raise DataError([Problem(str(file.path), None, fix) for file in others[:10]])
    try:
        transformers = library.transformers()
    except ImportError:
        fix = "chat templates need transformers: pip install 'megatron_qwen[hf]'."
        raise DataError(Problem("calibration", None, fix)) from None
    template = transformers.AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    if not template.chat_template:
        fix = "has no chat template (in tokenizer_config.json or chat_template.jinja); give texts instead."
        raise DataError(Problem(str(tokenizer), None, fix))

    def ids() -> Iterator[list[int]]:
        for place, messages in _conversations(files):
            try:
                yield list(template.apply_chat_template(messages, tokenize=True, return_dict=False))
            except Exception as error:  # whatever a template raises
                raise DataError(Problem(place, None, f"does not fit the chat template ({error}).")) from None

    return _windows(ids(), choice, where=_named(files))


def _conversations(files: Sequence[InputFile]) -> Iterator[tuple[str, list[Any]]]:
    """The conversations of files, each with its place for a message."""
    for file in files:
        for number, line in enumerate(_lines(file), start=1):
            if not line.strip():
                continue
            place = f"{file.path}:{number}"
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise DataError(Problem(place, None, f"is not JSON ({error}).")) from None
            messages = record.get("messages") if isinstance(record, dict) else None
            if not isinstance(messages, list) or not all(isinstance(one, dict) and "role" in one for one in messages):
                fix = 'has no "messages": a list of {"role": ..., "content": ...} is expected.'
                raise DataError(Problem(place, None, fix))
            if messages:
                yield place, messages


def _lines(file: InputFile) -> Iterator[bytes]:
    held = b""
    for piece in unpacked(file, lambda _: None):
        *lines, held = (held + piece).split(b"\n")
        yield from lines
    yield held


def _windows(ids: Iterable[list[int]], choice: SampleChoice, *, where: str) -> Samples:
    """Windows over documents that are joined, chosen among the first ``_READ`` times as many tokens."""
    found: list[torch.Tensor] = []
    total = 0
    for one in ids:
        found.append(torch.tensor(one, dtype=torch.int64))
        total += len(one)
        if total >= _READ * choice.tokens:
            break
    _require(total, choice, where=where, what="the texts hold")
    windows = torch.cat(found)[: total // choice.length * choice.length].view(-1, choice.length)
    return Samples(windows[_chosen(len(windows), choice)], where)


def _chosen(there: int, choice: SampleChoice) -> list[int]:
    return random.Random(choice.seed).sample(range(there), choice.count)


def _require(there: int, choice: SampleChoice, *, where: str, what: str) -> None:
    """Raises DataError if there are too few tokens."""
    if there < choice.tokens:
        fewer = there // choice.length
        way_out = f", or take {fewer} samples" if fewer else f", or shorter samples than {choice.length:,} tokens"
        needed = f"{choice.count:,} samples of {choice.length:,} tokens need {choice.tokens:,}"
        raise DataError(Problem(where, f"{there:,} tokens", f"{needed}, and {what} fewer; give more{way_out}."))


def _named(files: Sequence[InputFile]) -> str:
    return ", ".join(str(file.path) for file in files[:3]) + (", ..." if len(files) > 3 else "")
