"""``mq convert``: between checkpoints and Hugging Face directories, and what there is to know of either."""

import argparse
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_qwen.cli import Parser, run_program
from megatron_qwen.errors import ConfigError, Problem

if TYPE_CHECKING:
    from checkpoints_convert.to_hf import Converted

_UNITS = {"": 1e9, "GB": 1e9, "MB": 1e6, "KB": 1e3, "B": 1}
_DTYPES = ["bf16", "fp16", "fp32"]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        "mq convert",
        description="Converts between checkpoints and Hugging Face directories, and compares them. Needs no GPU, no "
        "process group and no model in memory; a killed conversion goes on with the same command.",
        examples=[
            "mq convert to-hf runs/first out/first-hf",
            "mq convert from-hf Qwen2.5-7B runs/qwen2.5-7b-start",
            "mq convert verify runs/first out/first-hf --logits",
        ],
    )
    actions = parser.add_subparsers(dest="action", required=True)
    _to_hf_parser(actions)
    _from_hf_parser(actions)
    return parser


def _to_hf_parser(actions: "argparse._SubParsersAction[Parser]") -> None:
    parser = actions.add_parser(
        "to-hf",
        help="checkpoint to Hugging Face directory",
        description="Writes a directory that transformers loads: weights, configuration, tokenizer, model card and a "
        "manifest of hashes. It appears only when it is complete; killed, the same command goes on.",
        examples=[
            "mq convert to-hf runs/first out/first-hf --license apache-2.0",
            "mq convert to-hf runs/first out/first-hf --iteration 500 --dtype bf16",
            "mq convert to-hf megatron/iter_0005000 out/7b --config qwen2_5_7b model.rotary_base=1e6 --tokenizer tok",
        ],
    )
    parser.add_argument("checkpoint", type=Path, help="a run directory, a checkpoint root or one iteration")
    parser.add_argument("out", type=Path, help="the directory to make")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="corrects what --config says")
    parser.add_argument("--iteration", type=int, help="which checkpoint; default: the newest")
    parser.add_argument("--config", help="recipe or run.yaml, for a checkpoint of Megatron-LM or Megatron-Bridge")
    parser.add_argument("--dtype", choices=_DTYPES, help="default: the format of the checkpoint")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer directory; default: the one the run had")
    parser.add_argument("--license", help="licence in the model card, such as apache-2.0")
    parser.add_argument(
        "--check",
        choices=["all", "weights"],
        default="all",
        help="what is compared with the checkpoint's manifest: all of it, or only what is exported (all)",
    )
    _writing_options(parser, default="5GB, or the files the model came in")


def _from_hf_parser(actions: "argparse._SubParsersAction[Parser]") -> None:
    parser = actions.add_parser(
        "from-hf",
        help="Hugging Face directory to checkpoint",
        description="Writes a checkpoint that any layout loads, with run.yaml and tokenizer, from a Qwen2, Qwen2-MoE, "
        "Qwen3 or Qwen3-MoE directory with safetensors. Training goes on from it with "
        "`mq train OUT/run.yaml data.path=... --run-dir RUN`.",
        examples=["mq convert from-hf Qwen2.5-7B start/qwen2.5-7b", "mq convert from-hf hf start/fp32 --dtype fp32"],
    )
    parser.add_argument("hf_dir", type=Path, help="directory with config.json and safetensors files")
    parser.add_argument("out", type=Path, help="the directory to make")
    parser.add_argument("--dtype", choices=_DTYPES, help="default: the format of the directory")
    _writing_options(parser, default="5GB")


def _writing_options(parser: argparse.ArgumentParser, *, default: str) -> None:
    size_help = f"size of a file, such as 5GB or 200MB; a bare number is GB ({default})"
    parser.add_argument("--max-shard-size", type=str, metavar="SIZE", help=size_help)
    workers = max(1, min(4, os.cpu_count() or 1))
    parser.add_argument("--workers", type=int, default=workers, help=f"files written at a time ({workers})")
    parser.add_argument("--restart", action="store_true", help="throw away another unfinished conversion to OUT")
    parser.add_argument("--json", action="store_true", help="the result as JSON on standard output")


def size_in_bytes(text: str | None) -> int | None:
    """``5GB``, ``200MB``, ``5`` (GB) as bytes.

    Raises:
        ConfigError: it is no size, or out of all proportion.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None or not 1 <= (size := float(match.group(1)) * unit) <= 1e15:
        raise ConfigError(Problem("--max-shard-size", text, "must be a size above 0, such as 5GB or 200MB."))
    return int(size)


def _to_hf(options: argparse.Namespace) -> int:
    from checkpoints_convert.checkpoint_source import open_checkpoint
    from checkpoints_convert.to_hf import ExportOptions, export

    source = open_checkpoint(
        options.checkpoint,
        iteration=options.iteration,
        config=options.config,
        overrides=options.overrides,
        tokenizer=options.tokenizer,
    )
    how = ExportOptions(
        dtype=options.dtype,
        max_shard_bytes=size_in_bytes(options.max_shard_size),
        workers=options.workers,
        license_=options.license,
        check_everything=options.check == "all",
        restart=options.restart,
        quiet=options.json,
    )
    return _say(export(source, options.out, how), str(source.path), as_json=options.json)


def _from_hf(options: argparse.Namespace) -> int:
    from checkpoints_convert.from_hf import ImportOptions, convert

    how = ImportOptions(
        dtype=options.dtype,
        max_shard_bytes=size_in_bytes(options.max_shard_size),
        workers=options.workers,
        restart=options.restart,
        quiet=options.json,
    )
    return _say(convert(options.hf_dir, options.out, how), str(options.hf_dir), as_json=options.json)


def _say(done: "Converted", source: str, *, as_json: bool) -> int:
    from checkpoints_convert.progress import gb

    if as_json:
        print(json.dumps({"source": source, **done.as_json()}))
    elif done.complete_before:
        print(f"{done.out}: is complete already, every file as its manifest says")
    else:
        kept = f", {gb(done.kept_bytes)} of it kept from before" if done.kept_bytes else ""
        rate = (done.weight_bytes - done.kept_bytes) / max(done.seconds, 1e-9) / 1e9
        print(f"{done.out}: {gb(done.weight_bytes)} from {source}{kept} in {done.seconds:.1f} s, {rate:.2f} GB/s")
    return 0


def main(arguments: Sequence[str]) -> int:
    """Converts."""
    options = parser().parse_args(arguments)
    if getattr(options, "workers", 1) < 1:
        raise ConfigError(Problem("--workers", options.workers, "must be at least 1."))
    if hasattr(options, "max_shard_size"):
        size_in_bytes(options.max_shard_size)
    from megatron_qwen import device

    device.keep_freed_memory()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("checkpoints_convert").setLevel(logging.INFO)
    try:
        return {"to-hf": _to_hf, "from-hf": _from_hf}[options.action](options)
    except KeyboardInterrupt:
        if hasattr(options, "out"):
            logging.getLogger(__name__).warning("interrupted; the same command goes on where this stopped")
        raise


if __name__ == "__main__":
    run_program(main)
