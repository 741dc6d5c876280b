"""A stretch of a run in which one mix of sources is read at one length: sample by sample, and from where to where."""

import threading
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_qwen.data.order import packing, stream
from megatron_qwen.data.order.apportion import Apportionment

TokenSpan = tuple[int, int]


@dataclass(frozen=True)
class SourceOrder:
    """What decides the order of a source's tokens: a stream of windows, or documents to pack."""

    windows: stream.StreamLayout | None
    documents: packing.Documents | None


@dataclass(frozen=True)
class SourcePosition:
    """How far a source has been read.

    Args:
        seq_length: of its samples; None before the first.
        ordinal: how many times the length has changed.
        taken: samples of this length that were taken.
        pieces: the stream they are windows of.
        cursor: the pools they are rows of, of a source that is packed.
    """

    seq_length: int | None = None
    ordinal: int = 0
    taken: int = 0
    pieces: stream.Pieces = stream.WHOLE
    cursor: packing.Cursor = packing.BEGINNING

    def cut(self, order: SourceOrder, seq_length: int) -> "SourcePosition":
        """The same place, to be read on at a length."""
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
        """The place some samples further."""
        return SourcePosition(self.seq_length, self.ordinal, self.taken + samples, self.pieces, self.cursor)

    def reader(self, order: SourceOrder) -> "stream.Windows | packing.PackedRows":
        """Where the samples lie, by number from the last change of length on."""
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
    """Samples of one mix, numbered through the run.

    Args:
        orders: of the sources.
        weights: share of each source.
        seq_length: tokens of a sample.
        first_sample: number of the phase's first sample in the run.
        begins: where each source stands at that sample, cut for this length.
        counts: samples that each source has given in this phase; the others are not asked for any more.
        resumed: where each source stands then; a packed source is found from there.
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
        self._lock = threading.RLock()  # one thread reads ahead while another asks how far the run is

    def __getitem__(self, sample: int) -> tuple[str, int, list[TokenSpan]]:
        """The source of a sample, its number among that source's samples of this length, and its spans of tokens."""
        chosen, index = self._assigned(sample - self.first_sample)
        name = self.names[chosen]
        number = self.begins[name].taken + index
        return name, number, self._readers[name][number]

    def counts(self, samples: int) -> dict[str, int]:
        """Samples that each source has given once the phase has given ``samples``."""
        with self._lock:
            if samples > self._known_from:
                self._assigned(samples - 1)
            since = np.array(self._sources[: samples - self._known_from], dtype=np.int64)
            counts = np.bincount(since, minlength=len(self.names)) + self._counts_there
        return dict(zip(self.names, counts.tolist(), strict=True))

    def positions(self, samples: int) -> dict[str, SourcePosition]:
        """Where each source stands once the phase has given ``samples``."""
        found = {}
        for name, count in self.counts(samples).items():
            position, reader = self.begins[name].on(count), self._readers[name]
            if isinstance(reader, packing.PackedRows):
                position = replace(position, cursor=reader.advanced(position.taken))
            found[name] = position
        return found

    def forget(self, samples: int) -> None:
        """Lets go of what is known of the phase's first samples: they are not asked for again."""
        with self._lock:
            gone = samples - self._known_from
            if gone > 0:
                self._counts_there = list(self.counts(samples).values())
                del self._sources[:gone], self._indices[:gone]
                self._known_from = samples

    def _assigned(self, number: int) -> tuple[int, int]:
        assert number >= self._known_from, "a sample of the past, in a phase that was resumed after it"
        with self._lock:
            while number - self._known_from >= len(self._sources):
                chosen, index = self._next.next()
                self._sources.append(chosen)
                self._indices.append(index)
            return self._sources[number - self._known_from], self._indices[number - self._known_from]
