"""The command line of ``mq data``."""

import argparse
from pathlib import Path
from typing import Any

from megatron_qwen.cli import Parser

_FILES = (
    "files, folders, patterns, or @list (a file with one a line); .jsonl, .ndjson, .json, .txt, .parquet, "
    "also compressed"
)


def parser() -> argparse.ArgumentParser:
    """All actions; each names the module that does it."""
    parser = Parser(
        "mq data",
        description="Trains tokenizers, turns text into token files, and shows what is in them.",
        examples=[
            "mq data tokenizer train --vocab-size 8192 --output tok corpus.jsonl",
            "mq data prepare --tokenizer tok --output data/corpus corpus.jsonl notes.txt",
            "mq data inspect data/corpus",
            "mq data verify data/corpus",
            "mq data merge --output data/all data/corpus data/more",
        ],
    )
    actions = parser.add_subparsers(dest="action", required=True)
    _tokenizer(actions)
    _clean(actions)
    _prepare(actions)
    _look(actions)
    _merge(actions)
    _reading(actions)
    return parser


def _tokenizer(actions: Any) -> None:
    tokenizer = actions.add_parser(
        "tokenizer",
        help="train a tokenizer, or import one",
        description="Trains a tokenizer on text, or makes one of a rank file of tiktoken.",
        examples=[
            "mq data tokenizer train --vocab-size 8192 --output tok corpus.jsonl",
            "mq data tokenizer import-tiktoken qwen.tiktoken --output qwen",
        ],
    )
    tokenizer.set_defaults(module="tools.data.tokenizer")
    ways = tokenizer.add_subparsers(dest="way", required=True)
    train = ways.add_parser(
        "train",
        help="on text",
        description="Trains a tokenizer on text.",
        examples=["mq data tokenizer train --vocab-size 8192 --output tok corpus.jsonl"],
    )
    train.add_argument("--vocab-size", type=int, required=True, help="number of ids, including control tokens")
    train.add_argument("--kind", choices=["bpe", "sentencepiece"], default="bpe")
    train.add_argument("--field", default="text", help="field of a JSON line that holds the text")
    train.add_argument("files", nargs="+", help=_FILES)
    ranks = ways.add_parser(
        "import-tiktoken",
        help="from a rank file",
        description="Makes a Hugging Face tokenizer of a rank file, with Qwen2.5's pre-tokenizer and control tokens.",
        examples=["mq data tokenizer import-tiktoken qwen.tiktoken --output qwen"],
    )
    ranks.add_argument("ranks", type=Path, help="lines of a token in base64 and its rank")
    for one in (train, ranks):
        one.add_argument("--output", type=Path, required=True, help="tokenizer directory to create")


def _prepare(actions: Any) -> None:
    prepare = actions.add_parser(
        "prepare",
        help="text to .bin / .idx",
        description="Turns text into token files: a line's field in .jsonl, a row's in .parquet, and a whole .txt are "
        "documents. The same command resumes where it was stopped.",
        examples=[
            "mq data prepare --tokenizer tok --output data/corpus corpus.jsonl notes.txt",
            "mq data prepare --tokenizer tok --output data/web --where lang=en --on-error skip 'crawl/**/*.jsonl.zst'",
            "mq data prepare --tokenizer tok --output data/web --shard-gib 8 --task 3/16 @files.txt",
            "mq data prepare --chat --tokenizer Qwen2.5-7B-Instruct --output data/chat --max-tokens 32768 chats.jsonl",
        ],
    )
    prepare.set_defaults(module="tools.data.prepare")
    prepare.add_argument("--tokenizer", type=Path, required=True, help="tokenizer directory")
    prepare.add_argument("--output", type=Path, required=True, help="prefix of the token file")
    chat = prepare.add_argument_group("conversations")
    chat.add_argument(
        "--chat",
        action="store_true",
        help="records are conversations (OpenAI's, ShareGPT's or Alpaca's form), which the tokenizer's chat template "
        "renders; the assistant's messages alone carry loss",
    )
    chat.add_argument(
        "--pairs",
        action="store_true",
        help="records are pairs of a chosen and a rejected answer (TRL's or ShareGPT's form), for objective.kind=dpo",
    )
    chat.add_argument("--max-tokens", type=int, help="leave out longer conversations, and count them")
    chat.add_argument(
        "--template-variable",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="for the chat template, such as enable_thinking=false; VALUE is JSON or a text",
    )
    chat.add_argument(
        "--message-weights",
        action="store_true",
        help="a message's weight may be any number of hundredths from 0 to 1: so much its loss counts",
    )
    chat.add_argument(
        "--no-loss-between",
        nargs=2,
        action="append",
        default=[],
        metavar=("BEGIN", "END"),
        help="no loss on what an answer has from one text to another, as '<think>' '</think>'",
    )
    prepare.add_argument("--field", default="text", help="field or column that holds the text")
    prepare.add_argument("--prompt-field", help="field of text that goes before it and carries no loss")
    prepare.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="use only matching records (also != > >= < <=)",
    )
    prepare.add_argument(
        "--end-token", metavar="TOKEN", help="what ends a document; default: the eos_token of the tokenizer's files"
    )
    prepare.add_argument(
        "--control-tokens",
        choices=["text", "encode"],
        default="text",
        help="what becomes of control tokens, such as <|im_start|>, that documents spell: text, or the tokens",
    )
    prepare.add_argument("--separator", help="what divides a .txt into documents; default: nothing does")
    prepare.add_argument("--max-document-mib", type=int, default=512, help="a longer document is a bad one")
    prepare.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="at a bad record: stop, or write it to PREFIX.skipped.jsonl and continue",
    )
    prepare.add_argument("--workers", type=int, help="processes; default: one per core")
    prepare.add_argument("--shard-gib", type=float, help="GiB of input in one token file; default: one token file")
    prepare.add_argument("--task", metavar="K/N", help="make every N-th shard from the K-th (K from 0): one of N tasks")
    prepare.add_argument("--json", action="store_true", help="the manifest, as JSON")
    prepare.add_argument("files", nargs="+", help=_FILES)


def _clean(actions: Any) -> None:
    clean = actions.add_parser(
        "clean",
        help="filter documents and remove duplicates",
        description="Takes text through the stages that are asked for, and writes what is kept as .jsonl.zst, with a "
        "report of what each stage dropped.",
        examples=[
            "mq data clean --output clean --exact --near 0.8 --min-chars 200 crawl.jsonl",
            "mq data clean --output clean --tokenizer tok --test-set mmlu.jsonl gsm8k.jsonl -- crawl.jsonl",
            "mq data clean --output clean --quality model.bin --quality-label good --min-quality 0.6 crawl.jsonl",
        ],
    )
    clean.set_defaults(module="tools.data.clean")
    clean.add_argument("--output", type=Path, required=True, help="directory to create")
    clean.add_argument("--exact", action="store_true", help="drop exact duplicates of an earlier document")
    clean.add_argument(
        "--near", type=float, metavar="SIMILARITY", help="drop documents at least this similar to an earlier one"
    )
    clean.add_argument("--test-set", nargs="+", help="drop documents that contain a part of these test sets")
    clean.add_argument("--test-field", default="text", help="field of their text")
    clean.add_argument("--tokenizer", type=Path, help="tokenizer directory whose tokens the rule counts")
    clean.add_argument("--whole-documents", action="store_true", help="compare documents, not their paragraphs")
    clean.add_argument("--min-chars", type=int, default=0, help="minimum length in characters")
    clean.add_argument("--max-chars", type=int, help="maximum length in characters")
    clean.add_argument("--min-letters", type=float, default=0.0, help="minimum share of letters")
    clean.add_argument("--max-repetition", type=float, default=1.0, help="maximum share of repeated lines")
    clean.add_argument("--quality", metavar="MODEL", help="fastText model, or module:function that scores a text")
    clean.add_argument("--quality-label", help="label of the fastText model")
    clean.add_argument("--min-quality", type=float, default=0.5, help="least score")
    clean.add_argument("--field", default="text", help="field or column that holds the text")
    clean.add_argument("--where", action="append", default=[], metavar="FIELD=VALUE", help="use only matching records")
    clean.add_argument("--on-error", choices=["stop", "skip"], default="stop", help="at a bad record")
    clean.add_argument("--workers", type=int, help="processes; default: one per core")
    clean.add_argument("--json", action="store_true", help="the report, as JSON")
    clean.add_argument("files", nargs="+", help=_FILES)


def _look(actions: Any) -> None:
    inspect = actions.add_parser(
        "inspect",
        help="what is in token files",
        description="Counts, lengths, bytes per token, the longest documents, and text where a tokenizer is given.",
        examples=[
            "mq data inspect data/corpus --tokenizer tok",
            "mq data inspect data/web data/code --histogram lengths.png",
            "mq data inspect --chat data/chat --tokenizer tok --head 5",
            "mq data inspect --chat data/chat data/tools --tokenizer tok --random 1 --html chats.html",
        ],
    )
    inspect.set_defaults(module="tools.data.inspect")
    inspect.add_argument("prefix", nargs="+", type=Path)
    inspect.add_argument("--samples", type=int, default=3, help="documents shown, spread over the file")
    inspect.add_argument("--chat", action="store_true", help="show conversations, with what carries loss")
    inspect.add_argument("--head", type=int, default=3, help="conversations of each prefix")
    inspect.add_argument("--random", type=int, metavar="SEED", help="some from anywhere, instead of the first")
    inspect.add_argument("--html", type=Path, metavar="FILE", help="write a page instead")
    inspect.add_argument("--histogram", type=Path, help="picture of the lengths to draw, .png or .svg")
    verify = actions.add_parser(
        "verify",
        help="compare every byte with the manifest",
        description="Reads everything: checksums, counts, ids and the index.",
        examples=["mq data verify data/corpus"],
    )
    verify.set_defaults(module="tools.data.verify")
    verify.add_argument("prefix", type=Path)
    for one in (inspect, verify):
        one.add_argument("--tokenizer", type=Path, help="tokenizer directory, to show text")
        one.add_argument("--json", action="store_true")


def _merge(actions: Any) -> None:
    merge = actions.add_parser(
        "merge",
        help="several token files as one",
        description="Joins token files made with one tokenizer: linked as shards of a set, or written as one file.",
        examples=["mq data merge --output data/all data/corpus data/more"],
    )
    merge.set_defaults(module="tools.data.merge")
    merge.add_argument("--output", type=Path, required=True, help="prefix of the result")
    merge.add_argument("--single", action="store_true", help="one .bin and .idx; copies all tokens")
    merge.add_argument("--json", action="store_true")
    merge.add_argument("prefixes", nargs="+", type=Path)


def _reading(actions: Any) -> None:
    plan = actions.add_parser(
        "plan",
        help="what a run will read",
        description="Steps, samples, tokens and epochs of every stage and source, before anything runs.",
        examples=["mq data plan qwen2_5_7b data.blend=blend.yaml training.train_iters=100000"],
    )
    plan.set_defaults(module="tools.data.plan", takes_overrides=True)
    plan.add_argument("source", help="a recipe or a run.yaml; then section.field=value overrides")
    plan.add_argument("--json", action="store_true")
    ledger = actions.add_parser(
        "ledger",
        help="what a run has read",
        description="What every stage of a run has read of every source, or the samples that one step saw.",
        examples=["mq data ledger runs/7b", "mq data ledger runs/7b --step 1234 --tokenizer tok"],
    )
    ledger.set_defaults(module="tools.data.ledger")
    ledger.add_argument("run", type=Path, help="run directory")
    ledger.add_argument("--step", type=int, help="show the samples of this step")
    ledger.add_argument("--tokenizer", type=Path, help="tokenizer directory, to show their text")
    ledger.add_argument("--json", action="store_true")
