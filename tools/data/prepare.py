"""``mq data prepare``: text to token files."""

import argparse
import json
import logging
import os
import re
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_qwen.errors import ConfigError, Problem
from tools.data.inputs import told_inputs

if TYPE_CHECKING:
    from megatron_qwen.data.chat.options import ChatOptions
    from megatron_qwen.data.prepare.workers import EncodingProgress

_TERMINAL_S, _LOG_S = 0.2, 30.0


def main(options: argparse.Namespace) -> int:
    """Prepares."""
    from megatron_qwen.data.chat.forms import FORMS
    from megatron_qwen.data.prepare.job import ShardTask, prepare
    from megatron_qwen.data.prepare.plan import make_plan
    from megatron_qwen.data.text.blocks import ReadOptions
    from megatron_qwen.data.text.filters import parse_conditions
    from megatron_qwen.data.tokenizers.tokenizer import DocumentOptions

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    task = _require_sensible(options)
    read = ReadOptions(
        field=options.field,
        prompt_field=options.prompt_field,
        where=parse_conditions(options.where),
        separator=options.separator,
        max_document_bytes=options.max_document_mib << 20,
        chat=options.chat or options.pairs,
        pairs=options.pairs,
    )
    inputs = told_inputs(options.files, text_field=FORMS if options.chat else (options.field,))
    documents = DocumentOptions(options.end_token, control_as_text=options.control_tokens == "text")
    plan = make_plan(
        inputs.files,
        tokenizer=options.tokenizer,
        prefix=options.output,
        options=read,
        documents=documents,
        chat=_chat_options(options) if options.chat or options.pairs else None,
        skip_bad=options.on_error == "skip",
        left_out=inputs.left_out,
        shard_bytes=None if options.shard_gib is None else int(options.shard_gib * (1 << 30)),
    )
    for note in plan.notes:
        print(f"{options.tokenizer}: {note}", file=sys.stderr)
    show = ProgressDisplay(sum(file.size for file in inputs.files) // task[1])
    workers = options.workers or len(os.sched_getaffinity(0))
    whole = prepare(plan, workers=workers, task=ShardTask(*task), on_progress=show)
    show.close()
    if whole is None:
        print(f"{options.output}: the shards of task {task[0]}/{task[1]} are made; those of other tasks are missing")
    elif options.json:
        print(json.dumps(asdict(whole), indent=2))
    else:
        left_out = [
            f"{count:,} {text}"
            for count, text in (
                (whole.empty, "empty ones left out"),
                (whole.filtered, "filtered out"),
                (whole.skipped, f"bad ones written to {options.output}*.skipped.jsonl"),
            )
            if count
        ]
        kind = "conversations" if options.chat else "documents"
        shards = f" in {len(whole.shards)} shards" if whole.shards else ""
        print(
            f"{options.output}: {whole.documents:,} {kind}{shards}, {whole.tokens:,} tokens"
            f"{''.join(', ' + text for text in left_out)}; {show.summary()}; {whole.encoder}"
        )
        if whole.chat:
            trained, answers = whole.chat["trained_tokens"], whole.chat["answers"]
            print(
                f"{options.output}: {trained:,} tokens ({trained / max(1, whole.tokens):.1%}) of {answers:,} answers "
                f"carry loss; the longest conversation has {whole.chat['longest']:,} tokens"
            )
            for reason, count in sorted(whole.chat["reasons"].items(), key=lambda item: -item[1]):
                print(f"{options.output}: {count:,} left out: {reason}")
        if whole.spelled_control_tokens:
            spelled = ", ".join(f"{name} {count:,}" for name, count in whole.spelled_control_tokens.items())
            what = "text; --control-tokens encode" if documents.control_as_text else "tokens; --control-tokens text"
            print(f"{options.output}: documents spell control tokens ({spelled}), encoded as {what} does otherwise")
    return 0


def _chat_options(options: argparse.Namespace) -> "ChatOptions":
    from megatron_qwen.data.chat.options import ChatOptions
    from megatron_qwen.data.chat.template import chat_template_of

    variables = {}
    for word in options.template_variable:
        name, sign, value = word.partition("=")
        if not sign or not name.isidentifier():
            raise ConfigError(Problem("--template-variable", word, "must be NAME=VALUE."))
        try:
            variables[name] = json.loads(value)
        except ValueError:
            variables[name] = value
    silent = tuple((first, last) for first, last in options.no_loss_between)
    if any(not text for pair in silent for text in pair):
        raise ConfigError(Problem("--no-loss-between", "", "needs two texts that are not empty."))
    return ChatOptions(
        chat_template_of(options.tokenizer, variables), options.max_tokens, options.message_weights, silent
    )


def _require_sensible(options: argparse.Namespace) -> tuple[int, int]:
    """The task as numbers, or every option that makes no sense."""
    problems = []
    if options.workers is not None and options.workers < 1:
        problems.append(Problem("--workers", options.workers, "must be at least 1."))
    if not 1 <= options.max_document_mib <= 1 << 20:
        problems.append(Problem("--max-document-mib", options.max_document_mib, "must be from 1 to 1,048,576."))
    if options.shard_gib is not None and not 0 < options.shard_gib < float("inf"):
        problems.append(Problem("--shard-gib", options.shard_gib, "must be a number above 0."))
    if options.max_tokens is not None and options.max_tokens < 2:
        problems.append(Problem("--max-tokens", options.max_tokens, "must be at least 2."))
    others = {
        "--max-tokens": options.max_tokens is not None,
        "--template-variable": bool(options.template_variable),
        "--message-weights": options.message_weights,
        "--no-loss-between": bool(options.no_loss_between),
    }
    texts = {
        "--field": options.field != "text",
        "--prompt-field": options.prompt_field is not None,
        "--separator": options.separator is not None,
    }
    for name, given in (texts if options.chat or options.pairs else others).items():
        if given:
            what = "has no effect on conversations" if options.chat else "needs --chat"
            problems.append(Problem(name, None, f"{what}; omit it."))
    if options.separator == "":
        problems.append(Problem("--separator", "", "must not be empty."))
    task = (0, 1)
    if options.task is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", options.task)
        if match is None or not int(match[1]) < int(match[2]):
            problems.append(Problem("--task", options.task, "must be K/N with K from 0 to N - 1, such as 3/16."))
        elif options.shard_gib is None:
            problems.append(Problem("--task", options.task, "requires --shard-gib: a task makes whole token files."))
        else:
            task = (int(match[1]), int(match[2]))
    if problems:
        raise ConfigError(problems)
    return task


class ProgressDisplay:
    """A live line on a terminal, a line now and then elsewhere.

    Args:
        input_bytes: what there is to read from disk.
    """

    def __init__(self, input_bytes: int) -> None:
        self._input = input_bytes
        self._read = self._bytes = self._documents = self._tokens = 0
        self._started = self._shown = time.monotonic()
        self._live = sys.stderr.isatty()

    def __call__(self, progress: "EncodingProgress") -> None:
        """Counts and shows."""
        self._read += progress.read
        self._bytes += progress.text_bytes
        self._documents += progress.documents
        self._tokens += progress.tokens
        now = time.monotonic()
        if now - self._shown >= (_TERMINAL_S if self._live else _LOG_S):
            self._shown = now
            end = "\r" if self._live else "\n"
            print(f"{self._line(now - self._started):<100}", end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clears the live line."""
        if self._live:
            print(" " * 100, end="\r", file=sys.stderr)

    def summary(self) -> str:
        """Time and speed of the whole."""
        seconds = time.monotonic() - self._started
        return f"{seconds:.1f} s, {self._bytes / 1e6 / max(seconds, 1e-9):.1f} MB/s"

    def _line(self, seconds: float) -> str:
        share = min(self._read / self._input, 1.0) if self._input else 1.0
        left = f"{seconds * (1 - share) / share:,.0f} s left" if share > 0.01 else "time left not known yet"
        return (
            f"{100 * share:5.1f} %  {self._documents:,} documents ({self._documents / seconds:,.0f}/s)  "
            f"{self._tokens:,} tokens ({self._tokens / seconds:,.0f}/s)  {self._bytes / 1e6 / seconds:,.1f} MB/s  "
            f"{left}"
        )
