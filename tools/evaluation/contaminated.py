"""Whether a run has read the items of tasks, and what scores are without those that it has."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.model_source import open_model_source
from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer
from megatron_qwen.errors import DataError, Problem
from megatron_qwen.evaluation.contamination import NGRAM, Overlap
from megatron_qwen.files import atomic_write
from megatron_qwen.json_lines import objects
from tools.evaluation.intervals import of_items
from tools.evaluation.scoring import RESULTS, SAMPLES
from tools.evaluation.search import Item, WhatWasRead, search

FOLDER = "contamination"
# Of the shorter text, what a run of tokens must have to count in the Qwen2.5 report (arXiv 2412.15115).
_LONG_SHARE = 0.6


def check(
    path: Path,
    tasks: Mapping[str, Any],
    *,
    iteration: int | None = None,
    output: Path | None = None,
    ngram: int = NGRAM,
    workers: int = 1,
) -> dict[str, Any]:
    """Looks for the items of tasks in what a run has read.

    Args:
        path: run or checkpoint.
        tasks: of the harness, with their data.
        iteration: which checkpoint; None is the newest.
        output: directory of ``mq eval --output``, for scores and the list of items; None is none.
        ngram: shortest run of tokens that is looked for.
        workers: processes.

    Returns:
        By task: items, how many are too short to judge, how many are found, and their scores if there are any.

    Raises:
        DataError: the source has no ledger, or its token files are not those that it has read.
    """
    source = open_model_source(path, iteration=iteration)
    checkpoint, fix = source.checkpoint, "does not say what it has read; name a run or one of its checkpoints."
    ledger = None if checkpoint is None else checkpoint.state.get("data")
    if checkpoint is None or source.tokenizer is None or not isinstance(ledger, dict) or not ledger.get("phases"):
        raise DataError(Problem(str(path), None, fix))
    read = WhatWasRead(checkpoint.config, ledger)
    items = items_of(tasks, source.tokenizer)
    found = search(read, items, ngram=ngram, workers=workers)
    return {task: _of_task(task, items, found, output=output, ngram=ngram) for task in tasks}


def items_of(tasks: Mapping[str, Any], tokenizer: Path) -> list[Item]:
    """The items of tasks: text without examples, and the right answer behind it."""
    encoder, found = load_tokenizer(tokenizer), []
    for name, task in tasks.items():
        docs = list(task.eval_docs)
        texts = [_text(task, doc) for doc in docs]
        found += [Item(name, number, ids) for number, ids in enumerate(encoder.encode_batch(texts))]
    return found


def _text(task: Any, doc: Any) -> str:
    text, target = task.doc_to_text(doc), task.doc_to_target(doc)
    if task.get_config("output_type") == "multiple_choice":
        if isinstance(text, int):  # Winogrande's kind: choices are beginnings, the target is the end
            return f"{task.doc_to_choice(doc)[text]}{task.config.target_delimiter}{target}"
        choices = task.doc_to_choice(doc)
        target = choices[target] if isinstance(target, int) and 0 <= target < len(choices) else target
    if isinstance(target, list):
        target = target[0] if target else ""
    return f"{text}{task.config.target_delimiter if text else ''}{target}"


def _of_task(
    task: str, items: Sequence[Item], found: Mapping[int, Overlap], *, output: Path | None, ngram: int
) -> dict[str, Any]:
    own = [(place, item) for place, item in enumerate(items) if item.task == task]
    lines, seen, long = [], set(), set()
    for place, item in own:
        one = found.get(place)
        if one is not None:
            seen.add(item.doc_id)
            if one.tokens >= _LONG_SHARE * len(item.tokens):
                long.add(item.doc_id)
        told = None if one is None else asdict(one)
        lines.append({"doc_id": item.doc_id, "tokens": len(item.tokens), "longest": told})
    said: dict[str, Any] = {
        "items": len(own),
        "too_short": sum(len(item.tokens) < ngram for _, item in own),
        "found": len(seen),
        "found_mostly": len(long),
        "ngram": ngram,
    }
    if output is not None:
        folder = output / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / f"{task}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        said["scores"] = _scores(task, output, seen)
    return said


def _scores(task: str, output: Path, seen: set[int]) -> dict[str, dict[str, float | None]]:
    """Metrics over all items, those that were found, and the others; empty where the task was not scored."""
    try:
        figures = json.loads((output / RESULTS).read_bytes())["results"][task]
        samples = list(objects((output / SAMPLES / f"{task}.jsonl").read_bytes().splitlines()))
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    found: dict[str, dict[str, float | None]] = {}
    for name in figures:
        metric, _, kind = name.partition(",")
        values = of_items(samples, metric, kind)
        if values is None or values.ndim != 1:
            continue
        ids = [sample["doc_id"] for sample in samples if sample.get("filter", "none") == kind]
        known = np.isin(ids, sorted(seen))
        found[name] = {
            "all": float(values.mean()),
            "found": float(values[known].mean()) if known.any() else None,
            "others": float(values[~known].mean()) if not known.all() else None,
        }
    return found
