"""``mq convert``: between checkpoints and Hugging Face directories."""

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_qwen.cli import Parser, run_program
from megatron_qwen.errors import ConfigError, Problem


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        "mq convert",
        description="Turns a checkpoint into a directory that transformers loads. Needs no GPU and no process group.",
        examples=[
            "mq convert to-hf runs/first out/first-hf",
            "mq convert to-hf runs/first out/first-hf --iteration 500 --dtype bf16",
        ],
    )
    actions = parser.add_subparsers(dest="action", required=True)
    to_hf = actions.add_parser(
        "to-hf",
        help="checkpoint to Hugging Face directory",
        description="Writes a directory that transformers loads. It appears only when it is complete.",
        examples=["mq convert to-hf runs/first out/first-hf"],
    )
    to_hf.add_argument("checkpoint", type=Path, help="a run directory, a checkpoint root or one iteration")
    to_hf.add_argument("out", type=Path, help="the directory to make")
    to_hf.add_argument("--iteration", type=int, help="which checkpoint; default: the newest whole one")
    to_hf.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: the format the run computed in")
    to_hf.add_argument("--max-shard-size", type=float, default=5.0, metavar="GB", help="size of a safetensors file (5)")
    to_hf.add_argument("--tokenizer", type=Path, help="tokenizer directory, where the run's has moved")
    to_hf.add_argument("--json", action="store_true")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Converts."""
    options = parser().parse_args(arguments)
    if not 1e-6 <= options.max_shard_size <= 1e6:
        raise ConfigError(Problem("--max-shard-size", options.max_shard_size, "must be a number of GB above 0."))
    from checkpoints_convert.to_hf import export

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    started = time.monotonic()
    source = export(
        options.checkpoint,
        options.out,
        iteration=options.iteration,
        dtype=options.dtype,
        max_shard_bytes=int(options.max_shard_size * 1e9),
        tokenizer=options.tokenizer,
    )
    seconds = time.monotonic() - started
    if options.json:
        print(json.dumps({"source": str(source), "out": str(options.out), "seconds": seconds}))
    else:
        print(f"{options.out}: exported from {source} in {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    run_program(main)
