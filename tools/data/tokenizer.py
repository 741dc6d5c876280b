"""``mq data tokenizer``: trains or imports a tokenizer."""

import argparse
import sys
import time

from megatron_qwen.errors import ConfigError, Problem
from tools.data.inputs import told_inputs

_MOST_IDS = 1_000_000


def main(options: argparse.Namespace) -> int:
    """Makes the tokenizer."""
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        taken = [Problem("--output", options.output, "is not an empty directory; name a new one.")]
    else:
        taken = []
    return _import(options, taken) if options.way == "import-tiktoken" else _train(options, taken)


def _import(options: argparse.Namespace, problems: list[Problem]) -> int:
    from megatron_qwen.data.tokenizers.making import import_tiktoken
    from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer

    if problems:
        raise ConfigError(problems)
    import_tiktoken(options.ranks, options.output)
    tokenizer = load_tokenizer(options.output)
    control = len(tokenizer.control_tokens)
    print(f"{options.output}: {tokenizer.vocab_size - control:,} ordinary and {control} control tokens")
    return 0


def _train(options: argparse.Namespace, problems: list[Problem]) -> int:
    from megatron_qwen.data.text.blocks import ReadOptions
    from megatron_qwen.data.text.records import documents
    from megatron_qwen.data.tokenizers.making import train_bpe, train_sentencepiece
    from megatron_qwen.data.tokenizers.tokenizer import CONTROL_TOKENS, load_tokenizer

    least = 256 + len(CONTROL_TOKENS)
    if not least <= options.vocab_size <= _MOST_IDS:
        fix = f"must be from {least} (256 bytes and the control tokens) to {_MOST_IDS:,}."
        problems = [Problem("--vocab-size", options.vocab_size, fix), *problems]
    if problems:
        raise ConfigError(problems)
    files = told_inputs(options.files, text_field=options.field).files
    train = train_bpe if options.kind == "bpe" else train_sentencepiece
    started = time.monotonic()
    train(documents(files, ReadOptions(field=options.field)), options.output, vocab_size=options.vocab_size)
    size = load_tokenizer(options.output).vocab_size
    print(f"{options.output}: {options.kind} tokenizer, {size} ids, {time.monotonic() - started:.1f} s")
    if size < options.vocab_size:
        print(
            f"{options.output}: the text has no more than these ids; --vocab-size asked for {options.vocab_size}",
            file=sys.stderr,
        )
    return 0
