"""The sources of a run, opened: which of their tokens are for training, and how a sample is read from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from megatron_qwen.config.blend import SINGLE, Blend, SourceSpec
from megatron_qwen.config.sections import DataConfig
from megatron_qwen.data.order import packing, stream
from megatron_qwen.data.order.permutation import KeyedPermutation
from megatron_qwen.data.order.stream import TokenSpan
from megatron_qwen.data.reading.fim import FillInTheMiddle, Piece
from megatron_qwen.data.reading.samples import ReadingOptions, Sample, packed, window
from megatron_qwen.data.token_files.manifest import Manifest, read_manifest
from megatron_qwen.data.token_files.token_set import TokenSet
from megatron_qwen.errors import DataError, Problem


@dataclass(frozen=True)
class OpenSource:
    """One source.

    Args:
        name: as the blend calls it.
        spec: as the blend describes it.
        tokens: its token files.
        documents: documents of the training part; those after it are held out for validation.
        stop: tokens of the training part.
    """

    name: str
    spec: SourceSpec
    tokens: TokenSet
    documents: int
    stop: int

    @property
    def where(self) -> str:
        """The configuration field or blend entry that names it, for messages."""
        return "data.path" if self.name == SINGLE and self.spec == SourceSpec(path=self.spec.path) else self.spec.path

    @cached_property
    def manifest(self) -> Manifest | None:
        """What is known of its token files; None of files that other programs wrote."""
        return self.tokens.manifest or read_manifest(self.tokens.prefix)

    @property
    def chat(self) -> Mapping[str, Any]:
        """``Manifest.chat``: what is known of its conversations, if it has any."""
        return {} if self.manifest is None else self.manifest.chat

    @cached_property
    def fim(self) -> FillInTheMiddle | None:
        """How its documents are rearranged, if they are."""
        if not self.spec.fim_rate:
            return None
        return FillInTheMiddle.of(
            {} if self.manifest is None else self.manifest.control_tokens,
            rate=self.spec.fim_rate,
            spm_rate=self.spec.fim_spm_rate,
            where=f"sources.{self.name}.fim_rate",
        )

    def identity(self) -> dict[str, Any]:
        """What must not change while a run reads it, and its path."""
        return {
            "path": self.spec.path,
            "packing": self.spec.packing,
            "tokens": self.stop,
            "documents": self.documents,
            "digest": self.tokens.digest,
        }

    def stream_layout(self, seed: int) -> stream.StreamLayout:
        """Sizes that decide its order."""
        return stream.StreamLayout.of(self.stop, seed=seed, name=self.name)

    def packable(self, seed: int) -> packing.Documents:
        """Its documents, for packing."""

        def starts(first: int, stop: int) -> Any:
            lengths = self.tokens.lengths(first, stop).astype(np.int64)
            return self.tokens.document_start(first) + np.concatenate(([0], np.cumsum(lengths)))

        return packing.Documents.of(self.documents, starts, seed=seed, name=self.name)

    def read(self, spans: list[TokenSpan], *, seq_length: int, reading: ReadingOptions, key: tuple[int, ...]) -> Sample:
        """The sample that some spans of its tokens make up."""
        if self.spec.packing == "best_fit":
            sample = packed(self.tokens, spans, seq_length=seq_length, reading=reading)
        else:
            sample = window(self.tokens, spans, stop=self.stop, reading=reading)
        return sample if self.fim is None else self.fim(sample, self._pieces(spans), key=key)

    def _pieces(self, spans: list[TokenSpan]) -> list[Piece]:
        """Documents and parts of documents in a sample made of some spans."""
        pieces: list[Piece] = []
        at = 0
        for begin, end in spans:
            start = at
            for last in (self.tokens.document_ends(begin, end) - begin + at).tolist():
                pieces.append((start, last + 1, True))
                start = last + 1
            at += end - begin
            if start < at:
                pieces.append((start, at, False))
        return pieces


@dataclass(frozen=True)
class HeldOut:
    """Windows over the documents at the end of a source that are never trained on, always in the same order.

    Args:
        source: whose.
        seq_length: tokens of a window.
        seed: key of the order.
        reading: how samples are read.
    """

    source: OpenSource
    seq_length: int
    seed: int
    reading: ReadingOptions

    is_packed = False

    @cached_property
    def windows(self) -> int:
        """How many there are."""
        return max(0, (self.source.tokens.num_tokens - self.source.stop - 1) // self.seq_length)

    def __getitem__(self, index: int) -> Sample:
        """Window ``index`` of an endless stream."""
        epoch, position = divmod(index, self.windows)
        number = KeyedPermutation(self.windows, self.seed, epoch)[position]
        start = self.source.stop + number * self.seq_length
        tokens = self.source.tokens
        return window(tokens, [(start, start + self.seq_length)], stop=tokens.num_tokens, reading=self.reading)


def open_model_sources(blend: Blend, data: DataConfig) -> dict[str, OpenSource]:
    """Opens the sources that any stage reads.

    Args:
        blend: which they are.
        data: the share held out.

    Raises:
        DataError: files are missing or damaged; all of them are named.
    """
    used = {name for stage in blend.stages for name in stage.weights}
    found: dict[str, OpenSource] = {}
    problems: list[Problem] = []
    for name in sorted(used):
        try:
            found[name] = open_model_source(name, blend.sources[name], fraction=data.validation_fraction)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return found


def open_model_source(name: str, spec: SourceSpec, *, fraction: float) -> OpenSource:
    """Opens one source.

    Args:
        name: as the blend calls it.
        spec: as the blend describes it.
        fraction: share of its documents that is held out, whether or not the run validates: what is training data
            must not depend on that.

    Raises:
        DataError: files are missing or damaged.
    """
    tokens = TokenSet(spec.path)
    held_out = max(1, round(tokens.num_documents * fraction)) if fraction else 0
    documents = tokens.num_documents - held_out
    stop = tokens.document_start(documents)
    if documents and not stop:
        fix = f"is damaged: its first {documents} documents are empty; prepare the data again."
        raise DataError(Problem(str(tokens.prefix), None, fix))
    if not documents:
        fix = "are all held out for validation; set data.validation_fraction=0 or prepare more documents."
        raise DataError(Problem(str(tokens.prefix), f"{tokens.num_documents} documents", fix))
    if spec.fim_rate and any(file.has_mask for file in tokens.files):
        fix = "cannot be combined with a source that has a loss mask (prompts without loss); set it to 0."
        raise DataError(Problem(f"sources.{name}.fim_rate", spec.fim_rate, fix))
    return OpenSource(name, spec, tokens, documents, stop)


def require_room(source: OpenSource, seq_length: int, *, where: str = "data.seq_length") -> None:
    """Raises DataError if the training part of a source has fewer tokens than one sample."""
    if source.stop > seq_length:
        return
    held_out = source.tokens.num_documents - source.documents
    why = (
        f" ({held_out} of its {source.tokens.num_documents} documents are held out for validation)" if held_out else ""
    )
    fix = f"has {source.stop} training tokens{why}; at least {where} + 1 = {seq_length + 1} are needed."
    more = " Set data.validation_fraction=0 or prepare more documents." if held_out else " Prepare more text."
    raise DataError(Problem(source.where, source.spec.path, fix + more))
