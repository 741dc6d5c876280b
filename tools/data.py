"""``mq data``: tokenizers and token files."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_qwen.cli import Parser, run_program
from megatron_qwen.errors import ConfigError, Problem


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        "mq data",
        description="Trains tokenizers and turns text into token files.",
        examples=[
            "mq data tokenizer train --vocab-size 8192 --output tok corpus.jsonl",
            "mq data prepare --tokenizer tok --output data/corpus corpus.jsonl notes.txt",
            "mq data inspect data/corpus",
            "mq data verify data/corpus",
        ],
    )
    actions = parser.add_subparsers(dest="action", required=True)
    tokenizer = actions.add_parser(
        "tokenizer",
        help="train a tokenizer",
        description="Trains a tokenizer on text.",
        examples=["mq data tokenizer train --vocab-size 8192 --output tok corpus.jsonl"],
    )
    tokenizer.add_argument("what", choices=["train"])
    tokenizer.add_argument("--vocab-size", type=int, required=True, help="ids in all, control tokens included")
    tokenizer.add_argument("--kind", choices=["bpe", "sentencepiece"], default="bpe")
    tokenizer.add_argument("--output", type=Path, required=True, help="tokenizer directory to make")
    prepare = actions.add_parser(
        "prepare",
        help="text to .bin / .idx",
        description="Turns text into a token file: a line's field in .jsonl is a document, and so is a whole .txt.",
        examples=["mq data prepare --tokenizer tok --output data/corpus corpus.jsonl notes.txt"],
    )
    prepare.add_argument("--tokenizer", type=Path, required=True, help="tokenizer directory")
    prepare.add_argument("--output", type=Path, required=True, help="prefix of the token file")
    for one in (tokenizer, prepare):
        one.add_argument("--field", default="text", help="field of a JSON line that holds the text")
        one.add_argument("files", nargs="+", type=Path)
    for name, text in (("inspect", "what is in a token file"), ("verify", "compare every byte with the manifest")):
        one = actions.add_parser(name, help=text, description=text, examples=[f"mq data {name} data/corpus"])
        one.add_argument("prefix", type=Path)
        one.add_argument("--tokenizer", type=Path, help="tokenizer directory, to show text")
        one.add_argument("--json", action="store_true")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Does what was asked for."""
    options = parser().parse_args(arguments)
    if options.action == "tokenizer":
        return _train(options)
    if options.action == "prepare":
        return _prepare(options)
    return _inspect(options)


def _train(options: argparse.Namespace) -> int:
    from megatron_qwen.data.text import check_files, documents
    from megatron_qwen.data.tokenizer import CONTROL_TOKENS, load_tokenizer, train_bpe, train_sentencepiece

    least, most = 256 + len(CONTROL_TOKENS), 1_000_000
    problems = []
    if not least <= options.vocab_size <= most:
        fix = f"must be from {least} (256 bytes and the control tokens) to {most:,}."
        problems.append(Problem("--vocab-size", options.vocab_size, fix))
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        problems.append(Problem("--output", options.output, "is no empty directory; name a new one."))
    if problems:
        raise ConfigError(problems)
    check_files(options.files)
    train = train_bpe if options.kind == "bpe" else train_sentencepiece
    started = time.monotonic()
    train(documents(options.files, field=options.field), options.output, vocab_size=options.vocab_size)
    size = load_tokenizer(options.output).vocab_size
    print(f"{options.output}: {options.kind} tokenizer, {size} ids, {time.monotonic() - started:.1f} s")
    if size < options.vocab_size:
        print(
            f"{options.output}: the text has no more than these ids; --vocab-size asked for {options.vocab_size}",
            file=sys.stderr,
        )
    return 0


def _prepare(options: argparse.Namespace) -> int:
    from megatron_qwen.data.prepare import prepare, require_free
    from megatron_qwen.data.text import check_files, documents

    require_free(options.output)
    check_files(options.files)
    started = time.monotonic()

    def show(done: int, tokens: int) -> None:
        seconds = time.monotonic() - started
        print(
            f"\r{done:,} documents  {tokens:,} tokens  {tokens / max(seconds, 1e-9):,.0f} tokens/s",
            end="",
            file=sys.stderr,
        )

    live = show if sys.stderr.isatty() else None
    made = prepare(
        documents(options.files, field=options.field),
        tokenizer=options.tokenizer,
        prefix=options.output,
        on_progress=live,
    )
    if live:
        print(file=sys.stderr)
    skipped = f", {made.empty_documents} empty ones left out" if made.empty_documents else ""
    print(
        f"{options.output}: {made.documents:,} documents{skipped}, {made.tokens:,} tokens, "
        f"{time.monotonic() - started:.1f} s"
    )
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from megatron_qwen.data.prepare import read_manifest, verify
    from megatron_qwen.data.token_file import TokenFile
    from megatron_qwen.data.tokenizer import load_tokenizer

    file = verify(options.prefix) if options.action == "verify" else TokenFile(options.prefix)
    facts = {
        "documents": file.num_documents,
        "tokens": file.num_tokens,
        "dtype": str(file.dtype),
        "first_document": file.document(0)[:32].tolist(),
        **(read_manifest(options.prefix) or {}),
    }
    if options.tokenizer is not None:
        facts["first_text"] = load_tokenizer(options.tokenizer).decode(facts["first_document"])
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, value in facts.items():
        print(f"{name:<18}{value}")
    if options.action == "verify":
        print("every byte, every count and the index are as they were written")
    return 0


if __name__ == "__main__":
    run_program(main)
