"""Runs documents through the cleaning stages, in order, and reports what each stage dropped."""

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from megatron_qwen.data.clean.duplicates import ExactDuplicates, NearDuplicates, digest, signature
from megatron_qwen.data.clean.filters import Contamination, Filter, LengthAndCharacters, Quality
from megatron_qwen.data.prepare.forked import garbage_left_to_the_parent
from megatron_qwen.data.text.blocks import ReadOptions, as_text
from megatron_qwen.data.text.formats import InputFile
from megatron_qwen.data.text.inputs import LeftOut
from megatron_qwen.data.text.records import FileSpan, read_span
from megatron_qwen.data.tokenizers.tokenizer import tokenizers_without_threads
from megatron_qwen.errors import ConfigError, DataError, Problem
from megatron_qwen.files import publish, temporary_name

_SAMPLES, _SHOWN_CHARACTERS = 5, 300
_FILE_CHARACTERS = 1 << 30  # of a file: a unit of work for what reads them, chosen by hand
_LEVEL = 3  # zstd's default


@dataclass(frozen=True)
class CleaningStages:
    """The cleaning stages; None omits a stage.

    Args:
        characters: length and character filter.
        quality: model, label and least score of a classifier.
        tests: test sequences, tokenizer directory, and whether documents are compared whole.
        exact: whether exact duplicates are dropped.
        near: Jaccard similarity at which near duplicates are dropped.
    """

    characters: LengthAndCharacters | None = None
    quality: tuple[str, str | None, float] | None = None
    tests: tuple[tuple[str, ...], Path, bool] | None = None
    exact: bool = False
    near: float | None = None

    def filters(self) -> list[Filter]:
        """The stages that judge one document at a time."""
        found: list[Filter] = []
        if self.characters is not None:
            found.append(self.characters)
        if self.quality is not None:
            model, label, least = self.quality
            found.append(Quality(model, label=label, least=least))
        if self.tests is not None:
            texts, tokenizer, whole = self.tests
            found.append(Contamination(texts, tokenizer=tokenizer, whole=whole))
        return found


@dataclass
class DroppedDocuments:
    """The documents that a stage dropped: their number, and the first few."""

    documents: int = 0
    samples: list[dict[str, str]] = field(default_factory=list)


@dataclass
class CleaningReport:
    """Counts of documents: read = kept + empty + filtered + skipped + dropped by the stages; and what was not read."""

    read: int = 0
    kept: int = 0
    empty: int = 0
    filtered: int = 0
    skipped: int = 0
    dropped: dict[str, DroppedDocuments] = field(default_factory=dict)
    left_out: list[dict[str, str]] = field(default_factory=list)


def clean(
    files: Sequence[InputFile],
    output: Path,
    stages: CleaningStages,
    *,
    options: ReadOptions,
    skip_bad: bool,
    workers: int,
    on_progress: Callable[[int, int], None] = lambda *_: None,
    left_out: Sequence[LeftOut] = (),
) -> CleaningReport:
    """Writes what is kept as OUTPUT/clean_00000.jsonl.zst and so on, and OUTPUT/report.json.

    Args:
        files: the input.
        output: a directory that does not exist yet; it appears when everything is done.
        stages: what to drop. Of duplicates the first document stays.
        options: how records are read.
        skip_bad: count bad records instead of stopping.
        workers: processes.
        on_progress: called with documents read and kept so far.
        left_out: what lies among the input and is not read, for the report.

    Raises:
        ConfigError: the output exists already, or a stage cannot be set up.
        DataError: a record is bad, a file is damaged, or nothing is left.
    """
    if output.exists():
        raise ConfigError(Problem("--output", output, "exists already; name another directory or remove it."))
    filters = stages.filters()  # so that their errors are reported before anything is read
    names = [one.name for one in filters]
    exact, near = (
        ExactDuplicates() if stages.exact else None,
        None if stages.near is None else NearDuplicates(stages.near),
    )
    names += [one.name for one in (exact, near) if one is not None]
    report = CleaningReport(dropped={name: DroppedDocuments() for name in names})
    report.left_out = [{"path": str(item.path), "why": item.why} for item in left_out]
    partial = temporary_name(output)
    partial.mkdir(parents=True)
    try:
        with _Writer(partial) as writer:
            for where, text, reason, keys in _judged(files, stages, options, skip_bad, workers, report):
                stage_and_why = reason
                if stage_and_why is None and exact is not None and not exact.is_new(keys[0]):
                    stage_and_why = exact.name, "the same text came before"
                if stage_and_why is None and near is not None and not near.is_new(keys[1]):
                    stage_and_why = near.name, "nearly the same text came before"
                if stage_and_why is None:
                    report.kept += 1
                    writer.write(text)
                else:
                    _note(report.dropped[stage_and_why[0]], where, text, stage_and_why[1])
                on_progress(report.read, report.kept)
        if not report.kept:
            raise DataError(Problem(str(output), None, "no document is left after cleaning; nothing was written."))
        (partial / "report.json").write_text(json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n")
        publish(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _note(dropped: DroppedDocuments, where: str, text: str, why: str) -> None:
    dropped.documents += 1
    if len(dropped.samples) < _SAMPLES:
        dropped.samples.append({"file": where, "why": why, "text": text[:_SHOWN_CHARACTERS]})


Judged = tuple[str, str, tuple[str, str] | None, tuple[bytes, Any]]


def _judged(
    files: Sequence[InputFile],
    stages: CleaningStages,
    options: ReadOptions,
    skip_bad: bool,
    workers: int,
    report: CleaningReport,
) -> Iterator[Judged]:
    """Documents in order with what the filters say, and their keys for duplicates."""
    with garbage_left_to_the_parent(), ProcessPoolExecutor(workers, initializer=_begin, initargs=(stages,)) as pool:
        waiting: deque[tuple[str, list[str], Future[list[Any]]]] = deque()
        for where, texts in _blocks(files, options, skip_bad, report):
            waiting.append((where, texts, pool.submit(_judge, texts)))
            if len(waiting) > 2 * workers:  # bounds the documents in memory
                yield from _answers(*waiting.popleft())
        while waiting:
            yield from _answers(*waiting.popleft())


def _answers(where: str, texts: list[str], future: "Future[list[Any]]") -> Iterator[Judged]:
    for text, (reason, keys) in zip(texts, future.result(), strict=True):
        yield where, text, reason, keys


def _blocks(
    files: Sequence[InputFile], options: ReadOptions, skip_bad: bool, report: CleaningReport
) -> Iterator[tuple[str, list[str]]]:
    for file in files:
        for block in read_span(FileSpan(file), options):
            if block.bad and not skip_bad:
                raise DataError([bad.problem() for bad in block.bad[:10]])
            report.read += block.read
            report.empty += block.empty
            report.filtered += block.filtered
            report.skipped += len(block.bad)
            if block.texts:
                yield str(file.path), [as_text(text) for text in block.texts]


class _Process:
    """What a worker process has set up once."""

    stages: CleaningStages
    filters: list[Filter]


def _begin(stages: CleaningStages) -> None:
    tokenizers_without_threads()
    _Process.stages, _Process.filters = stages, stages.filters()


def _judge(texts: list[str]) -> list[tuple[tuple[str, str] | None, tuple[bytes, Any]]]:
    answers: list[tuple[tuple[str, str] | None, tuple[bytes, Any]]] = []
    for text in texts:
        found = next(((one.name, why) for one in _Process.filters if (why := one.reason(text)) is not None), None)
        stages = _Process.stages
        keys = (
            digest(text) if found is None and stages.exact else b"",
            signature(text) if found is None and stages.near is not None else None,
        )
        answers.append((found, keys))
    return answers


class _Writer:
    """Writes compressed JSON lines, a new file after every _FILE_CHARACTERS characters."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._number, self._written = directory, 0, 0
        self._file: Any = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, text: str) -> None:
        """Adds a document."""
        if self._file is None or self._written > _FILE_CHARACTERS:
            self.__exit__()
            path = self._directory / f"clean_{self._number:05d}.jsonl.zst"
            self._file = zstandard.open(path, "wb", cctx=zstandard.ZstdCompressor(level=_LEVEL))
            self._number, self._written = self._number + 1, 0
        self._file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
        self._written += len(text)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
