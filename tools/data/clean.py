"""``mq data clean``: drops documents that are better left out, and says which."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_qwen.errors import ConfigError, Problem
from tools.data.inputs import told_inputs

if TYPE_CHECKING:
    from megatron_qwen.data.clean.job import CleaningStages


def main(options: argparse.Namespace) -> int:
    """Cleans."""
    _require_sensible(options)
    from megatron_qwen.data.clean.job import clean, cores
    from megatron_qwen.data.text.blocks import ReadOptions
    from megatron_qwen.data.text.filters import parse_conditions

    read = ReadOptions(field=options.field, where=parse_conditions(options.where))
    inputs = told_inputs(options.files, text_field=options.field)

    def show(documents: int, kept: int) -> None:
        if documents % 1000 == 0 and sys.stderr.isatty():
            print(f"\r{documents:,} documents read, {kept:,} kept", end="", file=sys.stderr)

    report = clean(
        inputs.files,
        options.output,
        _stages(options),
        options=read,
        skip_bad=options.on_error == "skip",
        workers=options.workers or cores(),
        on_progress=show,
        left_out=inputs.left_out,
    )
    if options.json:
        print(json.dumps(asdict(report), indent=2))
        return 0
    print(f"{options.output}: {report.kept:,} of {report.read:,} documents kept")
    for name, dropped in report.dropped.items():
        print(f"  {name}: {dropped.documents:,} dropped")
        for sample in dropped.samples[:2]:
            print(f"    {sample['why']}: {sample['text'][:80]!r}")
    return 0


def _require_sensible(options: argparse.Namespace) -> None:
    problems = []
    for name in ("min_letters", "max_repetition", "near"):
        value = getattr(options, name)
        if value is not None and not 0 <= value <= 1:
            problems.append(Problem(f"--{name.replace('_', '-')}", value, "must be from 0 to 1."))
    if options.test_set and options.tokenizer is None:
        problems.append(Problem("--test-set", options.test_set[0], "requires --tokenizer: the rule counts tokens."))
    if options.workers is not None and options.workers < 1:
        problems.append(Problem("--workers", options.workers, "must be at least 1."))
    if problems:
        raise ConfigError(problems)


def _stages(options: argparse.Namespace) -> "CleaningStages":
    from megatron_qwen.data.clean.filters import LengthAndCharacters
    from megatron_qwen.data.clean.job import CleaningStages
    from megatron_qwen.data.text.blocks import ReadOptions
    from megatron_qwen.data.text.records import documents

    characters = LengthAndCharacters(
        min_characters=options.min_chars,
        max_characters=options.max_chars,
        min_letters=options.min_letters,
        max_repetition=options.max_repetition,
    )
    tests = None
    if options.test_set:
        texts = tuple(
            documents(
                told_inputs(options.test_set, text_field=options.test_field).files,
                ReadOptions(field=options.test_field),
            )
        )
        tests = (texts, Path(options.tokenizer), options.whole_documents)
    quality = None
    if options.quality is not None:
        quality = (options.quality, options.quality_label, options.min_quality)
    return CleaningStages(
        characters=None if characters == LengthAndCharacters() else characters,
        quality=quality,
        tests=tests,
        exact=options.exact,
        near=options.near,
    )
