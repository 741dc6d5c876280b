"""A phase: the part of a run in which one mix of sources is read at one sequence length."""

import threading
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_qwen.data.order import packing, stream
from megatron_qwen.data.order.apportion import Apportionment
from megatron_qwen.data.order.stream import TokenSpan


@dataclass(frozen=True)
class SourceOrder:
    """What determines the order of a source's tokens: a stream of windows, or documents to pack. One is None."""

    windows: stream.StreamLayout | None
    documents: packing.Documents | None


@dataclass(frozen=True)
class SourcePosition:
    """How far a source has been read.

    Args:
        seq_length: of its samples; None before the first.
        ordinal: how many times the length has changed.
        taken: samples of this length that were taken.
        pieces: the stream that the windows are cut from.
        cursor: position in the pools of a packed source.
    """

    seq_length: int | None = None
    ordinal: int = 0
    taken: int = 0
    pieces: stream.Pieces = stream.WHOLE
    cursor: packing.Cursor = packing.BEGINNING

    def cut(self, order: SourceOrder, seq_length: int) -> "SourcePosition":
        """The same position, prepared for reading on with samples of another length."""
        if self.seq_length in (None, seq_length):
            return SourcePosition(seq_length, self.ordinal, self.taken, self.pieces, self.cursor)
        assert self.seq_length is not None
        old = {"seq_length": self.seq_length, "ordinal": self.ordinal}
        pieces, cursor = self.pieces, self.cursor
        if order.windows is not None:
            pieces = stream.after(order.windows, pieces, **old, taken=self.taken)
        if order.documents is not None:
            cursor = packing.PackedRows(order.documents, cursor, **old).after(self.taken)
        return SourcePosition(seq_length, self.ordinal + 1, 0, pieces, cursor)

    def on(self, samples: int) -> "SourcePosition":
        """The position after some more samples."""
        return SourcePosition(self.seq_length, self.ordinal, self.taken + samples, self.pieces, self.cursor)

    def reader(self, order: SourceOrder) -> "stream.Windows | packing.PackedRows":
        """Maps the number of a sample, counted from the last change of length, to spans of the source."""
        assert self.seq_length is not None
        cut = {"seq_length": self.seq_length, "ordinal": self.ordinal}
        if order.documents is not None:
            return packing.PackedRows(order.documents, self.cursor, **cut)
        assert order.windows is not None
        return stream.Windows(order.windows, self.pieces, **cut)

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint's state."""
        return {
            "seq_length": self.seq_length,
            "ordinal": self.ordinal,
            "taken": self.taken,
            "pieces": stream.to_json(self.pieces),
            "cursor": packing.to_json(self.cursor),
        }

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> "SourcePosition":
        """What ``as_dict`` wrote."""
        return cls(
            saved["seq_length"],
            saved["ordinal"],
            saved["taken"],
            stream.from_json(saved["pieces"]),
            packing.from_json(saved["cursor"]),
        )


class Phase:
    """The samples of one phase, by their number in the run.

    Args:
        orders: of the sources.
        weights: share of each source.
        seq_length: tokens of a sample.
        first_sample: number of the phase's first sample in the run.
        begins: position of each source at that sample, for this length.
        counts: after a resume, samples that each source has given in this phase; earlier ones cannot be read.
        resumed: position of each source after those, so that a packed source need not pack from the beginning.
    """

    def __init__(
        self,
        orders: Mapping[str, SourceOrder],
        weights: Mapping[str, float],
        *,
        seq_length: int,
        first_sample: int,
        begins: Mapping[str, SourcePosition],
        counts: Mapping[str, int] | None = None,
        resumed: Mapping[str, SourcePosition] | None = None,
    ) -> None:
        self.weights, self.seq_length, self.first_sample = dict(weights), seq_length, first_sample
        self.names = sorted(weights)
        self.begins = {name: begins[name] for name in self.names}
        places = self.begins if resumed is None else resumed
        self._readers = {name: places[name].reader(orders[name]) for name in self.names}
        had = [0 if counts is None else counts[name] for name in self.names]
        self._next = Apportionment([weights[name] for name in self.names], had)
        self._known_from = self._next.given  # number in the phase of the first sample whose source is known
        self._counts_there = list(had)
        self._sources, self._indices = array("H"), array("q")
        self._lock = threading.RLock()  # a loader thread reads while the main thread asks for the position

    def __getitem__(self, sample: int) -> tuple[str, int, list[TokenSpan]]:
        """The source of a sample, its number among that source's samples of this length, and its spans of tokens."""
        chosen, index = self._assigned(sample - self.first_sample)
        name = self.names[chosen]
        number = self.begins[name].taken + index
        return name, number, self._readers[name][number]

    def counts(self, samples: int) -> dict[str, int]:
        """Number of samples of each source among the first ``samples`` of the phase."""
        with self._lock:
            if samples > self._known_from:
                self._assigned(samples - 1)
            since = np.array(self._sources[: samples - self._known_from], dtype=np.int64)
            counts = np.bincount(since, minlength=len(self.names)) + self._counts_there
        return dict(zip(self.names, counts.tolist(), strict=True))

    def positions(self, samples: int) -> dict[str, SourcePosition]:
        """Position of each source after ``samples`` samples of the phase."""
        found = {}
        for name, count in self.counts(samples).items():
            position, reader = self.begins[name].on(count), self._readers[name]
            if isinstance(reader, packing.PackedRows):
                position = replace(position, cursor=reader.advanced(position.taken))
            found[name] = position
        return found

    def forget(self, samples: int) -> None:
        """Frees what is stored about the first ``samples`` samples of the phase; they cannot be read any more."""
        with self._lock:
            gone = samples - self._known_from
            if gone > 0:
                self._counts_there = list(self.counts(samples).values())
                del self._sources[:gone], self._indices[:gone]
                self._known_from = samples

    def _assigned(self, number: int) -> tuple[int, int]:
        assert number >= self._known_from, "a sample before the one that the phase was resumed at"
        with self._lock:
            while number - self._known_from >= len(self._sources):
                chosen, index = self._next.next()
                self._sources.append(chosen)
                self._indices.append(index)
            return self._sources[number - self._known_from], self._indices[number - self._known_from]
