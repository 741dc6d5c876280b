"""Joins encoded parts, in order, into a token file. Its manifest is written last."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_qwen.data.chat.answers import answer_form
from megatron_qwen.data.prepare.part_file import COUNTS, Part, part_path
from megatron_qwen.data.prepare.plan import OutputShard, PreparationPlan
from megatron_qwen.data.token_files.manifest import (
    MEMBERS,
    Manifest,
    chats_together,
    file_digest,
    with_ending,
    write_manifest,
)
from megatron_qwen.data.token_files.token_index import write_index
from megatron_qwen.data.tokenizers.tokenizer import BpeTokenizer, Tokenizer
from megatron_qwen.errors import DataError, Problem
from megatron_qwen.files import publish, sync_stream

_COPY_BYTES = 1 << 22
# A sync after each so many tokens: at 4 bytes a token the final sync waits for at most 64 MiB. Chosen by hand.
_SYNC_TOKENS = 1 << 24
PART_ENDINGS = ("bin", "len", "bad", "mask", "json")


class ShardWriter:
    """Appends parts to a shard's temporary .bin as soon as they are complete, so that little is left to do at the end.

    Args:
        plan: what is prepared.
        shard: the shard.
    """

    def __init__(self, plan: PreparationPlan, shard: OutputShard) -> None:
        self.plan, self.shard = plan, shard
        self.parts: list[Part] = []
        self._endings = ("bin", "mask") if plan.has_mask else ("bin",)
        self._files: dict[str, BinaryIO] = {}
        self._buffer = memoryview(bytearray(_COPY_BYTES))
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._unsynced = 0
        self._syncs: list[Future[None]] = []
        self._digests = {ending: xxhash.xxh3_128() for ending in self._endings}

    def append(self, part: Part, *, trusted: bool) -> None:
        """Appends the next part.

        Args:
            part: its counts and hashes.
            trusted: True for a part made by this process; a part of an earlier attempt is compared with its hash.

        Raises:
            DataError: the part does not match its hash.
        """
        for ending in self._endings:
            if ending not in self._files:
                self._files[ending] = self._temporary(ending).open("wb")
            own = xxhash.xxh3_128()
            with part_path(self.plan.work, part.key, ending).open("rb", buffering=0) as source:
                while size := source.readinto(self._buffer):
                    piece = self._buffer[:size]
                    if not trusted:
                        own.update(piece)
                    self._digests[ending].update(piece)
                    self._files[ending].write(piece)
            if not trusted:
                self._compare(part, ending, own.hexdigest())
        if not trusted:  # the lengths are read at the end, for the index
            self._compare(part, "len", file_digest(part_path(self.plan.work, part.key, "len")))
        self.parts.append(part)
        self._unsynced += part.tokens
        if self._unsynced > _SYNC_TOKENS:
            self._unsynced = 0
            for file in self._files.values():
                file.flush()
                # The disk writes while workers encode, so that the final sync is short.
                self._syncs.append(self._syncer.submit(sync_stream, file))

    def _compare(self, part: Part, ending: str, digest: str) -> None:
        if digest != getattr(part, f"{ending}_xxh3_128"):
            part_path(self.plan.work, part.key, "json").unlink()
            fix = "did not match its checksum and was deleted; run the same command again to recreate it."
            raise DataError(Problem(str(part_path(self.plan.work, part.key, ending)), None, fix))

    def commit(self, tokenizer: Tokenizer, encoder: str, dtype: np.dtype[Any]) -> Manifest:
        """Writes index, skipped records and manifest, and renames all files to their final names."""
        prefix = self.shard.prefix
        counts = {name: sum(getattr(part, name) for part in self.parts) for name in COUNTS}
        self._syncer.shutdown()
        for sync in self._syncs:  # raises the first disk error
            sync.result()
        write_index(self._temporary("idx"), self._lengths, documents=counts["documents"], dtype=dtype)
        for file in self._files.values():
            sync_stream(file)
            file.close()
        names: list[tuple[Path, Path]] = [
            (self._temporary(ending), with_ending(prefix, f".{ending}")) for ending in (*self._endings, "idx")
        ]
        if counts["skipped"]:
            _concatenate([part_path(self.plan.work, part.key, "bad") for part in self.parts], self._temporary("bad"))
            names.append((self._temporary("bad"), with_ending(prefix, ".skipped.jsonl")))
        manifest = Manifest(
            **counts,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
            control_tokens=tokenizer.control_tokens,
            control_tokens_in_text=self.plan.identity["control_tokens"],
            spelled_control_tokens=_spelled(self.parts, tokenizer),
            tokenizer_sha256=self.plan.identity["tokenizer_sha256"],
            encoder=encoder,
            made_by=self.plan.fingerprint,
            bin_xxh3_128=self._digests["bin"].hexdigest(),
            idx_xxh3_128=file_digest(self._temporary("idx")),
            mask_xxh3_128=self._digests["mask"].hexdigest() if "mask" in self._endings else None,
            options=self.plan.identity["options"],
            inputs=_inputs(self.shard),
            chat=_chat(self.plan, self.parts, tokenizer),
            left_out=_left_out(self.plan) if prefix == self.plan.prefix else [],
        )
        for temporary, path in names:
            publish(temporary, path)
        write_manifest(prefix, manifest)
        for unit in self.shard.units:
            for ending in PART_ENDINGS:
                part_path(self.plan.work, unit.key, ending).unlink(missing_ok=True)
        return manifest

    def discard(self) -> None:
        """Closes the open files; parts stay for the next attempt."""
        self._syncer.shutdown()
        for file in self._files.values():
            file.close()
        for ending in (*self._endings, "idx", "bad"):
            self._temporary(ending).unlink(missing_ok=True)

    def _temporary(self, ending: str) -> Path:
        return self.plan.work / f"{self.shard.prefix.name}.{ending}.joining"

    def _lengths(self) -> Iterator[npt.NDArray[np.int32]]:
        for part in self.parts:
            yield np.fromfile(part_path(self.plan.work, part.key, "len"), dtype=np.int32)


def set_manifest(plan: PreparationPlan, shards: Sequence[Manifest]) -> Manifest:
    """The manifest of the set of all shards."""
    first = shards[0]
    together = xxhash.xxh3_128("".join(shard.bin_xxh3_128 for shard in shards).encode())
    masks = [shard.mask_xxh3_128 for shard in shards if shard.mask_xxh3_128 is not None]
    return Manifest(
        **{name: sum(getattr(shard, name) for shard in shards) for name in COUNTS},
        vocab_size=first.vocab_size,
        end_of_text=first.end_of_text,
        control_tokens=first.control_tokens,
        control_tokens_in_text=first.control_tokens_in_text,
        spelled_control_tokens=dict(sum((Counter(shard.spelled_control_tokens) for shard in shards), Counter())),
        tokenizer_sha256=first.tokenizer_sha256,
        encoder=", ".join(sorted({shard.encoder for shard in shards})),
        made_by=plan.fingerprint,
        bin_xxh3_128=together.hexdigest(),
        mask_xxh3_128=xxhash.xxh3_128("".join(masks).encode()).hexdigest() if masks else None,
        shards=[shard.prefix.name for shard, made in zip(plan.shards, shards, strict=True) if made.documents],
        options=plan.identity["options"],
        inputs=[{"path": str(file.path.absolute()), "size": file.size} for file in plan.files],
        left_out=_left_out(plan),
        chat=chats_together([shard.chat for shard in shards]),
    )


def _chat(plan: PreparationPlan, parts: Sequence[Part], tokenizer: Tokenizer) -> dict[str, Any]:
    """What a manifest says of conversations; empty where there are none."""
    if plan.chat is None:
        return {}
    reasons = sum((Counter(part.reasons) for part in parts), Counter[str]())
    assert isinstance(tokenizer, BpeTokenizer)  # the preparation began with one
    form = answer_form(plan.chat.template, tuple(tokenizer.spellable), tokenizer.written)
    return {
        **plan.chat.identity(),
        # What a base model may never have seen, and where an answer ends: training looks at both.
        "turn_tokens": {} if form is None else form.turn_tokens(tokenizer.spellable),
        "end_of_turn": None if form is None else tokenizer.spellable[form.ends],
        "trained_tokens": sum(part.trained for part in parts),
        "answers": sum(part.answers for part in parts),
        "longest": max((part.longest for part in parts), default=0),
        "reasons": dict(sorted(reasons.items())),
        **({MEMBERS: 2} if plan.options.pairs else {}),
    }


def _spelled(parts: Sequence[Part], tokenizer: Tokenizer) -> dict[str, int]:
    together = sum((Counter(part.spelled) for part in parts), Counter[str]())
    return {name: together[str(index)] for name, index in tokenizer.spellable.items() if str(index) in together}


def _left_out(plan: PreparationPlan) -> list[dict[str, str]]:
    return [{"path": str(item.path.absolute()), "why": item.why} for item in plan.left_out]


def _inputs(shard: OutputShard) -> list[dict[str, Any]]:
    files = {span.file.path: span.file.size for unit in shard.units for span in unit.spans}
    return [{"path": str(path.absolute()), "size": size} for path, size in files.items()]


def _concatenate(paths: Sequence[Path], target: Path) -> None:
    with target.open("wb") as out:
        for path in paths:
            out.write(path.read_bytes())
