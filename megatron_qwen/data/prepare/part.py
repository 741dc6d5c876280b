"""Encodes a unit into a part: its tokens, the lengths of its documents, and counts."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_qwen.data.prepare.chat_part import ChatPart
from megatron_qwen.data.prepare.part_file import Part, part_path
from megatron_qwen.data.prepare.plan import PreparationPlan, Unit
from megatron_qwen.data.text.blocks import BadRecord, Block, ChatDocument, Document
from megatron_qwen.data.text.long import LongText
from megatron_qwen.data.text.records import read_span
from megatron_qwen.data.token_files.token_index import token_dtype
from megatron_qwen.data.tokenizers.encoder import Encoder
from megatron_qwen.errors import DataError
from megatron_qwen.files import atomic_write_json, publish, temporary_name

_FLUSH_TOKENS = 1 << 21  # held before they are written: 8 MiB at 4 bytes, part of what bounds a worker's memory
# This much text of every unit is encoded a second time with the tokenizer's own library and compared, because gigatoken
# is another implementation: a difference would train the model on wrong ids without any error.
_SAMPLE_CHARACTERS = 4096
_REPORTED = 10


class _BadRecords(Exception):
    """A block has some, and none is to be skipped."""


def encode_unit(unit: Unit, plan: PreparationPlan, encoder: Encoder, on_progress: Callable[..., None]) -> Part:
    """Reads, encodes and writes a unit; the part's files get their names when all of them are complete.

    Args:
        unit: what to read.
        plan: how to read it.
        encoder: text to ids.
        on_progress: called with bytes read from disk, text bytes, documents and tokens since the last call.

    Raises:
        DataError: a record is bad and ``plan.skip_bad`` is off, or a file is damaged.
    """
    with _PartWriter(plan, unit.key, encoder) as out:
        read = [0]

        def on_read(size: int) -> None:
            read[0] += size

        for span in unit.spans:
            for block in read_span(span, plan.options, on_read):
                documents, tokens = out.part.documents, out.part.tokens
                try:
                    out.render(block)
                    if block.bad and not plan.skip_bad:
                        raise _BadRecords
                    out.add(block)
                except _BadRecords:
                    raise DataError([bad.problem() for bad in block.bad[:_REPORTED]]) from None
                except DataError as error:  # a document that this tokenizer cannot encode as it is asked to
                    there = [replace(one, fix=f"in {span.file.path}: {one.fix}") for one in error.problems]
                    raise DataError(there) from None
                on_progress(read[0], block.bytes, out.part.documents - documents, out.part.tokens - tokens)
                read[0] = 0
        on_progress(read[0], 0, 0, 0)
        return out.finish()


class _PartWriter:
    def __init__(self, plan: PreparationPlan, key: str, encoder: Encoder) -> None:
        work, masked = plan.work, plan.has_mask
        self.part = Part(key, mask=masked)
        self._chats = None if plan.chat is None else ChatPart(plan, encoder)
        self._encoder, self._dtype = encoder, token_dtype(encoder.vocab_size)
        encoder.spelled.clear()
        self._end = np.asarray([encoder.end_of_text], dtype=np.uint32)
        endings = ["bin", "len", "bad", *(["mask"] if masked else [])]
        self._paths = {ending: part_path(work, key, ending) for ending in endings}
        self._temporary = {ending: temporary_name(path) for ending, path in self._paths.items()}
        self._files = {ending: path.open("wb") for ending, path in self._temporary.items()}
        self._done = part_path(work, key, "json")
        self._digests = {ending: xxhash.xxh3_128() for ending in endings if ending != "bad"}
        self._pieces: list[npt.NDArray[Any]] = []
        self._masks: list[npt.NDArray[np.uint8]] = []
        self._held = self._sampled = 0

    def __enter__(self) -> "_PartWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)

    def render(self, block: Block) -> None:
        """Encodes the conversations of a block: one that its template cannot render is a bad record."""
        if self._chats is not None:
            self._chats.encode(block, self.part)

    def add(self, block: Block) -> None:
        """Encodes and writes the documents of a block, and its bad records to the file of skipped records."""
        part, lengths = self.part, []
        for text in _drained(block):
            lengths.append(self._document(text))
        if self._chats is not None:
            for chat in self._chats.drained():
                lengths.append(len(chat.ids))
                self._take(chat.ids, chat.mask)
        part.documents += len(lengths)
        part.tokens += sum(lengths)
        part.read += block.read
        part.empty += block.empty
        part.filtered += block.filtered
        part.skipped += len(block.bad)
        part.text_bytes += block.bytes
        self._write("len", np.asarray(lengths, dtype=np.int32).data)
        for bad in block.bad:
            self._files["bad"].write(_quarantined(bad))
        self._flush()

    def _document(self, text: Document) -> int:
        length = 0
        assert not isinstance(text, ChatDocument)
        if isinstance(text, LongText):
            for ids in self._encoder.encode_long(text):
                self._take(ids, 1)
                length += len(ids)
            self._take(self._end, 1)
            return length + 1
        parts = ((0, text[0]), (1, text[1])) if isinstance(text, tuple) else ((1, text),)
        for carries_loss, one in parts:
            kept: list[int] | None = [] if len(one) <= _SAMPLE_CHARACTERS - self._sampled else None
            for ids in self._encoder.encode(one):
                self._take(ids, carries_loss)
                length += len(ids)
                if kept is not None:
                    kept += ids.tolist()
            if kept is not None:
                self._sampled += len(one)
                self.part.samples.append((one, kept))
        self._take(self._end, 1)
        return length + 1

    def _take(self, ids: npt.NDArray[Any], carries_loss: "int | npt.NDArray[np.uint8]") -> None:
        self._pieces.append(ids)
        self._held += len(ids)
        if self.part.mask:
            if isinstance(carries_loss, int):
                carries_loss = np.full(len(ids), carries_loss, dtype=np.uint8)
            self._masks.append(carries_loss)
        if self._held >= _FLUSH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if self._pieces:
            whole = np.concatenate(self._pieces)
            same_width = whole.dtype.itemsize == self._dtype.itemsize
            data = whole.view(self._dtype) if same_width else whole.astype(self._dtype)
            self._write("bin", data.data)
            if self.part.mask:
                self._write("mask", np.concatenate(self._masks).data)
        self._pieces, self._masks, self._held = [], [], 0

    def _write(self, ending: str, data: memoryview) -> None:
        self._digests[ending].update(data)
        self._files[ending].write(data)

    def finish(self) -> Part:
        """Renames the files of the part to their final names, the JSON file last."""
        self._flush()
        if self._chats is not None:
            self._encoder.spelled.update(self._chats.spelled)
        self.part.spelled = {str(index): count for index, count in sorted(self._encoder.spelled.items())}
        for ending, digest in self._digests.items():
            setattr(self.part, f"{ending}_xxh3_128", digest.hexdigest())
        for file in self._files.values():
            file.close()
        for ending, path in self._temporary.items():
            publish(path, self._paths[ending])
        atomic_write_json(self._done, asdict(self.part), indent=None)
        return self.part


def _drained(block: Block) -> Iterator[Document]:
    """The documents of a block, each freed before the next is taken: one may be hundreds of MiB."""
    block.texts.reverse()
    while block.texts:
        yield block.texts.pop()


def _quarantined(bad: BadRecord) -> bytes:
    record = {"where": bad.where, "why": bad.fix, "raw": bad.raw.decode(errors="replace")}
    if bad.reason:
        record["reason"] = bad.reason
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
