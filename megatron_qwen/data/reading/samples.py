"""Builds one training sample from the spans of tokens that make it up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_qwen.data.order.stream import TokenSpan
from megatron_qwen.data.reading.extra_fields import ExtraField
from megatron_qwen.data.token_files.token_set import TokenSet
from megatron_qwen.errors import DataError, Problem


@dataclass(frozen=True)
class Sample:
    """One training sequence.

    Args:
        tokens: inputs, [s].
        labels: the tokens that follow, [s].
        loss_mask: weight of each label's loss, [s].
        starts: [n] positions at which independent sequences begin, the first is 0; they do not attend to one another.
        extra: the source's extra fields by name, [s] or [n].
        padding: positions at the end that hold no token.
        documents: numbers of the documents that a packed sample holds, in its order.
        members: how many sequences each of them is.
    """

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.float32]
    starts: npt.NDArray[np.int64]
    extra: Mapping[str, npt.NDArray[np.generic]] = field(default_factory=dict)
    padding: int = 0
    documents: tuple[int, ...] = ()
    members: tuple[int, ...] = ()


class SampleSource(Protocol):
    """Samples by number."""

    @property
    def seq_length(self) -> int:
        """Tokens of a sample."""

    @property
    def is_packed(self) -> bool:
        """Whether a sample may hold several independent sequences, so that batches are packed (THD, cu_seqlens)."""

    @property
    def extra_fields(self) -> tuple[ExtraField, ...]:
        """Fields that every sample has in addition."""

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``."""


@dataclass(frozen=True)
class ReadingOptions:
    """How samples are built from tokens.

    Args:
        eod_mask_loss: no loss on the token that follows an end of document.
        reset_attention_mask: documents do not attend to one another, and their positions start at 0.
        vocab_size: number of token ids of the model; an id outside is an error. None: not checked.
    """

    eod_mask_loss: bool
    reset_attention_mask: bool
    vocab_size: int | None = None


def window(tokens: TokenSet, spans: Sequence[TokenSpan], *, stop: int, reading: ReadingOptions) -> Sample:
    """A sample of consecutive tokens; a label is always the token that follows in the text.

    Args:
        tokens: the source.
        spans: [a, b) of the source's positions, in order.
        stop: end of the training part. Tokens after it are held out, so the last label before it carries no loss.
        reading: how.
    """
    inputs, labels, masks = [], [], []
    starts: list[int] = [0]
    length = 0
    for begin, end in spans:
        row = tokens.tokens(begin, min(end + 1, stop))
        mask = np.ones(end - begin, dtype=np.float32)
        if end == stop:
            row = np.append(row, row[-1:])
            mask[-1] = 0.0
        if (own := tokens.loss_mask(begin + 1, min(end + 1, stop))) is not None:
            mask[: len(own)] *= own / np.float32(tokens.loss_unit)
        if reading.eod_mask_loss or reading.reset_attention_mask:
            ends = tokens.document_ends(begin, end) - begin
            if reading.eod_mask_loss:
                mask[ends] = 0.0
            if reading.reset_attention_mask:
                starts += [length, *(length + ends + 1).tolist()]
        inputs.append(row[:-1])
        labels.append(row[1:])
        masks.append(mask)
        length += end - begin
    sample = Sample(_joined(inputs), _joined(labels), _joined(masks), _starts(starts, length))
    _require_known(tokens, spans, sample.tokens, reading)
    _require_known(tokens, [(begin + 1, end + 1) for begin, end in spans], sample.labels, reading)
    return sample


def packed(tokens: TokenSet, spans: Sequence[TokenSpan], *, seq_length: int, reading: ReadingOptions) -> Sample:
    """A sample of whole documents, or parts of long ones, as independent sequences; the rest is padding.

    Args:
        tokens: the source.
        spans: documents and parts as [a, b) of the source's positions.
        seq_length: tokens of the sample.
        reading: how.
    """
    row = np.zeros(seq_length, dtype=np.int64)
    labels = np.zeros(seq_length, dtype=np.int64)
    mask = np.zeros(seq_length, dtype=np.float32)
    starts, at, members = [], 0, []
    for begin, end in spans:
        size = end - begin
        own = tokens.tokens(begin, min(end + 1, tokens.num_tokens))
        row[at : at + size] = own[:size]
        labels[at : at + len(own) - 1] = own[1:]
        mask[at : at + size] = 1.0
        if (carried := tokens.loss_mask(begin + 1, begin + len(own))) is not None:
            mask[at : at + len(own) - 1] *= carried / np.float32(tokens.loss_unit)
        if len(tokens.document_ends(end - 1, end)):  # the next token belongs to another document
            mask[at + size - 1] = 0.0
            labels[at + size - 1] = row[at + size - 1]
        first = [at, *(at + tokens.member_starts(begin, end) - begin).tolist()]
        starts += first
        members.append(len(first))
        at += size
    if at < seq_length:
        row[at:] = labels[at:] = row[at - 1]
        starts.append(at)
    _require_known(tokens, spans, row[:at], reading)
    documents = tuple(tokens.document_at(begin) for begin, _ in spans)
    starts_ = _starts(starts, seq_length)
    return Sample(row, labels, mask, starts_, padding=seq_length - at, documents=documents, members=tuple(members))


def cut(sample: Sample, length: int) -> Sample:
    """The sample, split into independent sequences of ``length`` tokens."""
    size = len(sample.tokens)
    starts = np.union1d(sample.starts, np.arange(0, size, length, dtype=np.int64))
    return replace(sample, starts=starts)


def _joined[Kind: np.generic](parts: list[npt.NDArray[Kind]]) -> npt.NDArray[Kind]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _starts(found: list[int], length: int) -> npt.NDArray[np.int64]:
    starts = np.unique(np.asarray(found, dtype=np.int64))
    return starts[starts < length]


def _require_known(
    tokens: TokenSet, spans: Sequence[TokenSpan], row: npt.NDArray[np.int64], reading: ReadingOptions
) -> None:
    """Raises DataError for an id outside of the vocabulary, with file and document.

    In the embedding kernel the same error would be a device-side assertion without a place.
    """
    size = reading.vocab_size
    if size is None or (row.max() < size and row.min() >= 0):
        return
    at = int(np.argmax((row >= size) | (row < 0)))
    token = int(row[at])
    for begin, end in spans:
        if at < end - begin:
            (place,) = tokens.places(begin + at, begin + at + 1)
            fix = f"is not an id of the model's vocabulary of {size} ({place}); prepare it again."
            raise DataError(Problem("token", token, fix))
        at -= end - begin
