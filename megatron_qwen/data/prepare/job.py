"""Runs a preparation plan: text to token files, in one job or as one of several tasks."""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_qwen.data.chat.conversation import Conversation
from megatron_qwen.data.chat.template import TemplateRefuses
from megatron_qwen.data.prepare.chat_part import chat_encoder, keep_ready
from megatron_qwen.data.prepare.join import ShardWriter, set_manifest
from megatron_qwen.data.prepare.part_file import Part, part_path, read_part
from megatron_qwen.data.prepare.plan import OutputShard, PreparationPlan, Unit
from megatron_qwen.data.prepare.workers import EncodingProgress, Workers
from megatron_qwen.data.token_files.manifest import Manifest, manifest_path, read_manifest, with_ending, write_manifest
from megatron_qwen.data.token_files.token_index import token_dtype
from megatron_qwen.data.tokenizers import encoder as encoders
from megatron_qwen.data.tokenizers.encoder import Encoder, TokenizerEncoder
from megatron_qwen.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megatron_qwen.errors import ConfigError, DataError, Problem
from megatron_qwen.files import LockHeldError, atomic_write_json, exclusive_lock

log = logging.getLogger(__name__)

# File in the work directory that says why the tokenizer's own library is used instead of gigatoken.
_SLOW = "slow_encoder"
_SHOWN = 100  # characters of a conversation in a message
ENDINGS = (".bin", ".idx", ".mask", ".skipped.jsonl", ".json")


@dataclass(frozen=True)
class ShardTask:
    """Which output shards this process makes: every ``count``-th, starting at ``index``."""

    index: int = 0
    count: int = 1


class _OtherIds(Exception):
    """The fast encoder gives other ids than the tokenizer for a text."""


class _OtherRendering(_OtherIds):
    """A conversation has other ids or another mask than by Jinja and the tokenizer's own library."""


def prepare(
    plan: PreparationPlan,
    *,
    workers: int,
    task: ShardTask | None = None,
    on_progress: Callable[[EncodingProgress], None] = lambda _: None,
) -> Manifest | None:
    """Makes the shards of a task. The task that finishes last writes the manifest of the whole set.

    Parts that an earlier attempt left in the work directory are reused.

    Args:
        plan: what to make.
        workers: number of processes.
        task: which shards to make; None makes all.
        on_progress: called as work is done; reused parts are reported first.

    Returns:
        The manifest of the whole set, or None while other tasks have shards left.

    Raises:
        ConfigError: an output file exists already, or another preparation writes there.
        DataError: a document or a file is damaged, or the input has no text.
    """
    task = task or ShardTask()
    if (there := _made_before(plan)) is not None:
        return there
    _claim(plan)
    with _locked(plan.work / f"task_{task.index}_of_{task.count}.lock"), _without_empty_work(plan):
        mine = plan.shards[task.index :: task.count]
        encoder = _chosen_encoder(plan)
        try:
            _make(plan, mine, encoder, workers, on_progress)
        except _OtherIds as error:
            tokenizer = load_tokenizer(plan.tokenizer, end=plan.documents.end_token)
            if isinstance(error, _OtherRendering):
                why = f"slower; a conversation is rendered otherwise than by its template: {error}"
            else:
                why = f"slower; {encoders.cause(encoder, tokenizer, str(error), plan.documents)}"
            encoder = TokenizerEncoder(tokenizer, why, plan.documents)
            log.warning("%s: restarting with %s", plan.prefix, encoder.name)
            _forget_parts(plan, mine)
            (plan.work / _SLOW).write_text(why)
            _make(plan, mine, encoder, workers, on_progress)
    return _finish(plan)


def _chosen_encoder(plan: PreparationPlan) -> Encoder:
    """The encoder that an earlier attempt fell back to, else the fastest."""
    with contextlib.suppress(FileNotFoundError):
        why = (plan.work / _SLOW).read_text()
        return TokenizerEncoder(load_tokenizer(plan.tokenizer, end=plan.documents.end_token), why, plan.documents)
    return encoders.open_encoder(plan.tokenizer, plan.documents)


def _make(
    plan: PreparationPlan,
    shards: Sequence[OutputShard],
    encoder: Encoder,
    workers: int,
    on_progress: Callable[[EncodingProgress], None],
) -> None:
    open_shards = [shard for shard in shards if not manifest_path(shard.prefix).is_file()]
    done = {unit.key: read_part(plan.work, unit.key) for shard in open_shards for unit in shard.units}
    parts = {key: part for key, part in done.items() if part is not None}
    old = frozenset(parts)
    missing = [unit for shard in open_shards for unit in shard.units if unit.key not in parts]
    for part in parts.values():
        on_progress(EncodingProgress(0, part.text_bytes, part.documents, part.tokens))
    writers = (ShardWriter(plan, shard) for shard in open_shards)
    if missing and plan.chat is not None:
        keep_ready(plan, encoder)
    pool = Workers(min(workers, len(missing)), plan, encoder, missing) if missing else None
    messages = pool.run() if pool is not None else ()
    current = next(writers, None)
    try:
        # Loaded while the workers run already: their parts are used only if the comparison with the tokenizer succeeds.
        tokenizer = load_tokenizer(plan.tokenizer, end=plan.documents.end_token)
        dtype = token_dtype(tokenizer.vocab_size)
        proof = _Proof(plan, encoder, tokenizer)
        for key in old:
            proof.of(parts[key])  # whoever made it may have been killed before it did this
        for message in messages:
            if isinstance(message, EncodingProgress):
                on_progress(message)
                continue
            proof.of(message)
            parts[message.key] = message
            while current is not None and _append_ready(current, parts, old):
                current.commit(tokenizer, encoder.name, dtype)
                current = next(writers, None)
        while current is not None:
            whole = _append_ready(current, parts, old)
            assert whole
            current.commit(tokenizer, encoder.name, dtype)
            current = next(writers, None)
    finally:
        if current is not None:
            current.discard()
        if pool is not None:
            pool.close()


def _append_ready(writer: ShardWriter, parts: dict[str, Part], old: frozenset[str]) -> bool:
    """Appends the parts that are ready, in order; returns whether the shard is complete."""
    units = writer.shard.units
    while len(writer.parts) < len(units) and (part := parts.get(units[len(writer.parts)].key)) is not None:
        writer.append(part, trusted=part.key not in old)
    return len(writer.parts) == len(units)


class _Proof:
    """Compares the ids of an encoder with those of the tokenizer's own library; raises _OtherIds if any differs.

    Args:
        plan: of the preparation.
        encoder: what made the parts.
        tokenizer: the reference.
    """

    def __init__(self, plan: PreparationPlan, encoder: Encoder, tokenizer: Tokenizer) -> None:
        self._encoder, self._tokenizer, self._options = encoder, tokenizer, plan.documents
        self._chats = None
        if plan.chat is not None:
            reference = TokenizerEncoder(tokenizer, "the reference", plan.documents)
            self._chats = chat_encoder(plan, reference, fast=False)
        self._fast = not isinstance(encoder, TokenizerEncoder)
        self._unproven = self._fast  # for texts that spell control tokens
        if self._fast:
            self._prove(control=False)

    def of(self, part: Part) -> None:
        """Encodes the samples of a part again, and frees them."""
        if part.spelled and self._unproven:
            self._unproven = False
            self._prove(control=True)
        texts = [text for text, _ in part.samples]
        wanted = encoders.reference_ids(self._tokenizer, texts, self._options)
        for (text, found), ids in zip(part.samples, wanted, strict=True):
            if found != ids:
                raise _OtherIds(text)
        part.samples.clear()
        for chat in part.chats:
            parts = tuple((place, weight) for place, weight in chat.get("hundredths", ()))
            conversation = Conversation(chat["messages"], tuple(chat["tools"]), frozenset(chat["untrained"]), parts)
            assert self._chats is not None
            try:
                expected = self._chats(conversation)
            except TemplateRefuses as error:
                raise _OtherRendering(str(chat["messages"])[:_SHOWN]) from error
            if (expected.ids.tolist(), expected.mask.tolist()) != (chat["ids"], chat["mask"]):
                raise _OtherRendering(str(chat["messages"])[:_SHOWN])
        part.chats.clear()

    def _prove(self, *, control: bool) -> None:
        texts = encoders.probes(self._tokenizer, control=control)
        if (text := encoders.difference(self._encoder, self._tokenizer, texts, self._options)) is not None:
            raise _OtherIds(text)


def _forget_parts(plan: PreparationPlan, shards: Sequence[OutputShard]) -> None:
    for unit in _units(shards):
        part_path(plan.work, unit.key, "json").unlink(missing_ok=True)
    for shard in shards:
        for ending in reversed(ENDINGS):
            with_ending(shard.prefix, ending).unlink(missing_ok=True)


def _units(shards: Sequence[OutputShard]) -> Iterator[Unit]:
    for shard in shards:
        yield from shard.units


def _claim(plan: PreparationPlan) -> None:
    """Creates the work directory, or takes over an existing one: parts are named by content, so those that fit are used
    whatever the directory was created for.
    """
    stated = _stated(plan)
    there = None
    if stated.is_file():
        with contextlib.suppress(ValueError):
            there = json.loads(stated.read_text())
        if there == plan.identity:
            return
        for lock in plan.work.glob("task_*.lock"):
            with _locked(lock):
                pass
    require_free(plan)
    plan.work.mkdir(parents=True, exist_ok=True)
    atomic_write_json(stated, plan.identity)


def _made_before(plan: PreparationPlan) -> Manifest | None:
    """The manifest of an earlier, finished run of the same command, else None."""
    if _stated(plan).exists():
        return None
    try:
        there = read_manifest(plan.prefix)
    except DataError:
        return None
    if there is None or there.made_by != plan.fingerprint:
        return None
    shutil.rmtree(plan.work, ignore_errors=True)  # the run may have been killed while it removed the directory
    return there


def _stated(plan: PreparationPlan) -> Path:
    """The file in the work directory that says what is prepared there."""
    return plan.work / "plan.json"


def require_free(plan: PreparationPlan) -> None:
    """Raises ConfigError if any output file exists already."""
    prefixes = {plan.prefix, *(shard.prefix for shard in plan.shards)}
    paths = [with_ending(prefix, ending) for prefix in sorted(prefixes) for ending in ENDINGS]
    if there := [path for path in paths if path.exists()]:
        raise ConfigError(
            [Problem("--output", path, "exists already; name another prefix or remove it.") for path in there]
        )


@contextmanager
def _without_empty_work(plan: PreparationPlan) -> Iterator[None]:
    """Removes the work directory after an error, unless some parts were made."""
    try:
        yield
    except DataError:
        made = any(len(path.stem) > len("plan") for path in plan.work.glob("*.json"))
        made = made or any(manifest_path(shard.prefix).is_file() for shard in plan.shards)
        if made or len(list(plan.work.glob("task_*.lock"))) > 1:
            log.warning(
                "%s: finished parts are kept in %s; run the same command again to resume", plan.prefix, plan.work
            )
        else:
            shutil.rmtree(plan.work, ignore_errors=True)
        raise


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            # Workers are forked and would inherit the lock: one that outlives a killed job must not block the next.
            stack.enter_context(exclusive_lock(lock, timeout_s=0, inherited=False))
        except LockHeldError:
            fix = "another process is preparing this output; wait for it to finish, or stop it."
            raise ConfigError(Problem("--output", lock.parent, fix)) from None
        yield


def _finish(plan: PreparationPlan) -> Manifest | None:
    """If every shard is complete, writes the manifest of the set and removes the work directory."""
    shards = [read_manifest(shard.prefix) for shard in plan.shards]
    made = [shard for shard in shards if shard is not None]
    if len(made) < len(plan.shards):
        return None
    if sum(shard.documents for shard in made) == 0:
        for shard in plan.shards:
            for ending in (".json", ".idx", ".bin", ".mask"):
                with_ending(shard.prefix, ending).unlink(missing_ok=True)
        shutil.rmtree(plan.work, ignore_errors=True)
        raise DataError(Problem(str(plan.prefix), None, "the input has no text; nothing was written."))
    if plan.shards[0].prefix == plan.prefix:
        whole = made[0]
    else:
        whole = set_manifest(plan, made)
        write_manifest(plan.prefix, whole)
    shutil.rmtree(plan.work, ignore_errors=True)
    return whole
