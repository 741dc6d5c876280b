"""A preparation from a plan to token files, alone or as one of many tasks."""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_qwen.data.prepare.join import ShardWriter, set_manifest
from megatron_qwen.data.prepare.part import Part, part_path, read_part
from megatron_qwen.data.prepare.plan import OutputShard, PreparationPlan, Unit
from megatron_qwen.data.prepare.workers import EncodingProgress, Workers
from megatron_qwen.data.token_files.manifest import Manifest, manifest_path, read_manifest, with_ending, write_manifest
from megatron_qwen.data.token_files.token_index import token_dtype
from megatron_qwen.data.tokenizers import encoder as encoders
from megatron_qwen.data.tokenizers.encoder import PROBES, Encoder, TokenizerEncoder
from megatron_qwen.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megatron_qwen.errors import ConfigError, DataError, Problem
from megatron_qwen.files import LockHeldError, atomic_write_json, exclusive_lock

log = logging.getLogger(__name__)

# In the work directory: why the tokenizer's own library is used.
_SLOW = "slow_encoder"
ENDINGS = (".bin", ".idx", ".mask", ".skipped.jsonl", ".json")


@dataclass(frozen=True)
class ShardTask:
    """Which shards this process makes: every ``count``-th from ``index``."""

    index: int = 0
    count: int = 1


class _OtherIds(Exception):
    """The fast encoder and the tokenizer differ on a text."""


def prepare(
    plan: PreparationPlan,
    *,
    workers: int,
    task: ShardTask | None = None,
    on_progress: Callable[[EncodingProgress], None] = lambda _: None,
) -> Manifest | None:
    """Makes the shards of a task; the task that finds all of them made writes the manifest of the whole.

    What lies in the work directory from an earlier attempt is used.

    Args:
        plan: what is made.
        workers: processes.
        task: this task of several.
        on_progress: called as work is done; what an earlier attempt did comes first, at once.

    Returns:
        The manifest of the whole, or None while other tasks are at work.

    Raises:
        ConfigError: other files lie where this would write, or another preparation is under way there.
        DataError: a document or a file is bad, or there is no text at all.
    """
    task = task or ShardTask()
    if (there := _made_before(plan)) is not None:
        return there
    _claim(plan)
    with _alone(plan.work / f"task_{task.index}_of_{task.count}.lock"), _nothing_left_of_nothing(plan):
        mine = plan.shards[task.index :: task.count]
        encoder = _chosen_encoder(plan)
        try:
            _make(plan, mine, encoder, workers, on_progress)
        except _OtherIds as error:
            why = f"slower; gigatoken gives other ids for {str(error)[:60]!r}"
            encoder = TokenizerEncoder(load_tokenizer(plan.tokenizer), why)
            log.warning("%s: begins anew with %s", plan.prefix, encoder.name)
            _forget_parts(plan, mine)
            (plan.work / _SLOW).write_text(why)
            _make(plan, mine, encoder, workers, on_progress)
    return _finish(plan)


def _chosen_encoder(plan: PreparationPlan) -> Encoder:
    """What an earlier attempt has found to be right, else the fastest."""
    with contextlib.suppress(FileNotFoundError):
        return TokenizerEncoder(load_tokenizer(plan.tokenizer), (plan.work / _SLOW).read_text())
    return encoders.open_encoder(plan.tokenizer)


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
    pool = Workers(min(workers, len(missing)), plan, encoder, missing) if missing else None
    words = pool.run() if pool is not None else ()
    current = next(writers, None)
    try:
        # Loaded while the processes are at work already; what they made is used only if the proof holds.
        tokenizer = load_tokenizer(plan.tokenizer)
        dtype = token_dtype(tokenizer.vocab_size)
        if not isinstance(encoder, TokenizerEncoder):
            _prove(encoder, tokenizer, PROBES)
        for word in words:
            if isinstance(word, EncodingProgress):
                on_progress(word)
                continue
            _compare(word, tokenizer)
            word.samples.clear()
            parts[word.key] = word
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
    """Appends the parts that are there, in order; whether the shard is whole."""
    units = writer.shard.units
    while len(writer.parts) < len(units) and (part := parts.get(units[len(writer.parts)].key)) is not None:
        writer.append(part, trusted=part.key not in old)
    return len(writer.parts) == len(units)


def _prove(encoder: Encoder, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    if (text := encoders.difference(encoder, tokenizer, texts)) is not None:
        raise _OtherIds(text)


def _compare(part: Part, tokenizer: Tokenizer) -> None:
    """Encodes the part's samples again, by the tokenizer's own library."""
    texts = [text for text, _ in part.samples]
    for (text, found), ids in zip(part.samples, tokenizer.encode_batch(texts), strict=True):
        if found != ids:
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
    """Makes the work directory, or takes over the one there: parts that fit are used, whatever it was begun for."""
    stated = plan.work / "plan.json"
    there = None
    if stated.is_file():
        with contextlib.suppress(ValueError):
            there = json.loads(stated.read_text())
        if there == plan.identity:
            return
        for lock in plan.work.glob("task_*.lock"):
            with _alone(lock):
                pass
    require_free(plan)
    plan.work.mkdir(parents=True, exist_ok=True)
    atomic_write_json(stated, plan.identity)


def _made_before(plan: PreparationPlan) -> Manifest | None:
    """The manifest that the same command has left, its work done."""
    if plan.work.exists():
        return None
    try:
        there = read_manifest(plan.prefix)
    except DataError:
        return None
    return there if there is not None and there.made_by == plan.fingerprint else None


def require_free(plan: PreparationPlan) -> None:
    """Raises ConfigError where anything lies already that the work would write."""
    prefixes = {plan.prefix, *(shard.prefix for shard in plan.shards)}
    paths = [with_ending(prefix, ending) for prefix in sorted(prefixes) for ending in ENDINGS]
    if there := [path for path in paths if path.exists()]:
        raise ConfigError(
            [Problem("--output", path, "exists already; name another prefix or remove it.") for path in there]
        )


@contextmanager
def _nothing_left_of_nothing(plan: PreparationPlan) -> Iterator[None]:
    """Clears the work directory after an error that came before anything was made."""
    try:
        yield
    except DataError:
        made = any(len(path.stem) > len("plan") for path in plan.work.glob("*.json"))
        made = made or any(manifest_path(shard.prefix).is_file() for shard in plan.shards)
        if made or len(list(plan.work.glob("task_*.lock"))) > 1:
            log.warning("%s: what was made is kept in %s; the same command goes on from there", plan.prefix, plan.work)
        else:
            shutil.rmtree(plan.work, ignore_errors=True)
        raise


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            # Workers are forked: one that outlives a killed preparation must not keep the next one out.
            stack.enter_context(exclusive_lock(lock, timeout_s=0, inherited=False))
        except LockHeldError:
            fix = "another process is at work on this; wait for it, or end it."
            raise ConfigError(Problem("--output", lock.parent, fix)) from None
        yield


def _finish(plan: PreparationPlan) -> Manifest | None:
    """Writes the manifest of the whole and clears the work directory, if every shard is there."""
    shards = [read_manifest(shard.prefix) for shard in plan.shards]
    made = [shard for shard in shards if shard is not None]
    if len(made) < len(plan.shards):
        return None
    if sum(shard.documents for shard in made) == 0:
        for shard in plan.shards:
            for ending in (".json", ".idx", ".bin", ".mask"):
                with_ending(shard.prefix, ending).unlink(missing_ok=True)
        shutil.rmtree(plan.work, ignore_errors=True)
        raise DataError(Problem(str(plan.prefix), None, "the input holds no text; nothing was written."))
    if plan.shards[0].prefix == plan.prefix:
        whole = made[0]
    else:
        whole = set_manifest(plan, made)
        write_manifest(plan.prefix, whole)
    shutil.rmtree(plan.work, ignore_errors=True)
    return whole
