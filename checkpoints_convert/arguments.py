"""The command line of ``mq convert``; imports no torch, so that --help answers at once."""

import argparse
import os
import re
from pathlib import Path

from checkpoints_convert.quantize.arguments import quantize_parser
from megatron_qwen.cli import Parser
from megatron_qwen.errors import ConfigError, Problem

_UNITS = {"": 1e9, "GB": 1e9, "MB": 1e6, "KB": 1e3, "B": 1}
# Size at which a new file is begun where nobody says it. Here, not where files are written: that needs torch.
SHARD_BYTES = 5_000_000_000
_SHARD_SIZE = f"{SHARD_BYTES / 1e9:g}GB"
_DTYPES = ["bf16", "fp16", "fp32"]
_CONFIG_HELP = (
    "recipe or run.yaml, for a checkpoint of Megatron-LM or Megatron-Bridge; followed by section.field=value overrides"
)
TAKES_OVERRIDES = ("to-hf", "verify", "diff", "upcycle", "quantize")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        "mq convert",
        description="Converts between checkpoints and Hugging Face directories, and compares them. Needs no GPU, no "
        "process group and no model in memory; the same command resumes a killed conversion.",
        examples=[
            "mq convert to-hf runs/first out/first-hf",
            "mq convert from-hf Qwen2.5-7B runs/qwen2.5-7b-start",
            "mq convert verify runs/first out/first-hf --logits",
        ],
    )
    actions = parser.add_subparsers(dest="action", required=True)
    _to_hf_parser(actions)
    _from_hf_parser(actions)
    _verify_parser(actions)
    _inspect_parser(actions)
    _diff_parser(actions)
    _upcycle_parser(actions)
    _to_peft_parser(actions)
    _from_peft_parser(actions)
    _merge_parser(actions)
    _writing_options(quantize_parser(actions), default=_SHARD_SIZE)
    return parser


def _to_hf_parser(actions: "argparse._SubParsersAction[Parser]") -> None:
    parser = actions.add_parser(
        "to-hf",
        help="checkpoint to Hugging Face directory",
        description="Writes a directory that transformers loads: weights, configuration, tokenizer, model card and a "
        "manifest of hashes. It appears only when it is complete; after a kill the same command resumes.",
        examples=[
            "mq convert to-hf runs/first out/first-hf --license apache-2.0",
            "mq convert to-hf runs/first out/first-hf --iteration 500 --dtype bf16",
            "mq convert to-hf megatron/iter_0005000 out/7b --config qwen2_5_7b rope.base=1e6 --tokenizer tok",
        ],
    )
    parser.add_argument("checkpoint", type=Path, help="a run directory, a checkpoint root or one iteration")
    parser.add_argument("out", type=Path, help="the directory to create")
    parser.add_argument("--iteration", type=int, help="which checkpoint; default: the newest")
    parser.add_argument("--config", help=_CONFIG_HELP)
    parser.add_argument("--dtype", choices=_DTYPES, help="default: the dtype of the checkpoint")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer directory; default: the one the run had")
    parser.add_argument("--license", help="licence in the model card, such as apache-2.0")
    told = "name data, tokenizer and checkpoint by their paths on this machine in README.md and manifest.json"
    parser.add_argument("--local-paths", action="store_true", help=f"{told}; they have names and hashes otherwise")
    parser.add_argument(
        "--check",
        choices=["all", "weights"],
        default="all",
        help="compare with the checkpoint's manifest: all files, or only what is exported (%(default)s)",
    )
    _writing_options(parser, default=f"{_SHARD_SIZE}, or the files the model came in")


def _from_hf_parser(actions: "argparse._SubParsersAction[Parser]") -> None:
    parser = actions.add_parser(
        "from-hf",
        help="Hugging Face directory to checkpoint",
        description="Writes a checkpoint that any layout loads, with run.yaml and tokenizer, from a Qwen2, Qwen2-MoE, "
        "Qwen3 or Qwen3-MoE directory with safetensors. Continue training from it with "
        "`mq train OUT/run.yaml data.path=... --run-dir RUN`.",
        examples=["mq convert from-hf Qwen2.5-7B start/qwen2.5-7b", "mq convert from-hf hf start/fp32 --dtype fp32"],
    )
    parser.add_argument("hf_dir", type=Path, help="directory with config.json and safetensors files")
    parser.add_argument("out", type=Path, help="the directory to create")
    parser.add_argument("--dtype", choices=_DTYPES, help="default: the dtype of the directory")
    _writing_options(parser, default=_SHARD_SIZE)


def _verify_parser(actions: "argparse._SubParsersAction[Parser]") -> None:
    parser = actions.add_parser(
        "verify",
        help="compare two models",
        description="Compares every tensor (shape, format, bits), the configuration and the tokenizer of A and B, each "
        "a checkpoint, a Hugging Face directory or a manifest.json. A quantized directory is compared with the "
        "original by what rounding to nearest would give on its own grid. Exit code 1 where anything differs.",
        examples=[
            "mq convert verify runs/first out/first-hf",
            "mq convert verify out/first-hf out/first-hf/manifest.json",
            "mq convert verify runs/first out/first-hf --logits --prompt 'def main('",
            "mq convert verify out/fp32 out/bf16 --tolerance 0.004",
        ],
    )
    parser.add_argument("a", type=Path, help="checkpoint, Hugging Face directory or manifest.json")
    parser.add_argument("b", type=Path, help="what to compare with it")
    parser.add_argument("--config", help=_CONFIG_HELP)
    parser.add_argument("--iteration", type=int, help="which checkpoint of a run; default: the newest")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="largest difference in units of a tensor's largest value; above 0 dtypes may differ (%(default)g)",
    )
    parser.add_argument("--logits", action="store_true", help="also run both models, layer by layer")
    parser.add_argument("--prompt", action="append", default=[], help="text for --logits; default: built-in ones")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="dtype that --logits computes in (%(default)s)"
    )
    _common_options(parser)


def _inspect_parser(actions: "argparse._SubParsersAction[Parser]") -> None:
    parser = actions.add_parser(
        "inspect",
        help="what is in a checkpoint or a Hugging Face directory",
        description="Lists tensors, sizes and parts of the model; of a checkpoint, the iteration and the layout that "
        "wrote it; of a Hugging Face directory, bits a weight and how it is quantized. Reads no weights.",
        examples=["mq convert inspect runs/first", "mq convert inspect megatron/iter_0005000 --json"],
    )
    parser.add_argument(
        "checkpoint", type=Path, help="a run directory, a checkpoint root, one iteration, or a Hugging Face directory"
    )
    parser.add_argument("--iteration", type=int, help="which checkpoint; default: the newest")
    parser.add_argument("--json", action="store_true", help="the result as JSON on standard output")


def _diff_parser(actions: "argparse._SubParsersAction[Parser]") -> None:
    parser = actions.add_parser(
        "diff",
        help="how far the weights moved between two checkpoints",
        description="Prints the norm of the change from A to B in percent of the norm of A, by layer and part, and "
        "draws it.",
        examples=["mq convert diff runs/first/checkpoints/iter_0000500 runs/first/checkpoints/iter_0001000"],
    )
    parser.add_argument("a", type=Path, help="checkpoint or Hugging Face directory")
    parser.add_argument("b", type=Path, help="a later one")
    parser.add_argument("--config", help=_CONFIG_HELP)
    parser.add_argument("--png", type=Path, default=Path("checkpoint-diff.png"), help="picture (%(default)s)")
    _common_options(parser)


def _upcycle_parser(actions: "argparse._SubParsersAction[Parser]") -> None:
    parser = actions.add_parser(
        "upcycle",
        help="a mixture-of-experts (MoE) model that starts from a dense model",
        description="Cuts experts from a dense model's feed-forward: copies, or slices with a shared expert, "
        "whichever the recipe's sizes make of it. Says whether that gives the dense model's logits, and measures it.",
        examples=["mq convert upcycle runs/dense start/moe --recipe qwen1_5_moe_a2_7b model.num_layers=28"],
    )
    parser.add_argument("dense", type=Path, help="checkpoint or Hugging Face directory of a dense model")
    parser.add_argument("out", type=Path, help="the directory to create")
    parser.add_argument(
        "--recipe", required=True, help="recipe or run.yaml whose experts are taken; then section.field=value words"
    )
    parser.add_argument("--config", help="recipe or run.yaml of the dense model, where Megatron-LM wrote it")
    parser.add_argument("--seed", type=int, default=1234, help="of the router's rows (%(default)s)")
    parser.add_argument(
        "--router-std", type=float, help="of the router's rows; default: chosen by the recipe's routing"
    )
    share_help = "of the output that routed experts give where the shared expert holds the whole too (%(default)g)"
    parser.add_argument("--routed-share", type=float, default=0.5, help=share_help)
    parser.add_argument("--no-logits", action="store_true", help="do not run both models to compare them")
    parser.add_argument("--restart", action="store_true", help="discard a different unfinished conversion to OUT")
    _common_options(parser)


_BASE_HELP = "where the weights that its adapters are for are now, if they were moved"


def _to_peft_parser(actions: "argparse._SubParsersAction[Parser]") -> None:
    parser = actions.add_parser(
        "to-peft",
        help="adapters of a run with LoRA as PEFT's files",
        description="Writes adapter_config.json, adapter_model.safetensors and the tokenizer, which PEFT, transformers "
        "and others load beside the base model.",
        examples=["mq convert to-peft runs/lora out/adapter --base-name Qwen/Qwen2.5-7B"],
    )
    parser.add_argument("checkpoint", type=Path, help="a run directory, a checkpoint root or one iteration")
    parser.add_argument("out", type=Path, help="the directory to create")
    parser.add_argument("--iteration", type=int, help="which checkpoint; default: the newest")
    parser.add_argument("--base-name", help="base_model_name_or_path: the base model as transformers loads it")
    parser.add_argument("--local-paths", action="store_true", help="name data and checkpoint by their paths, too")
    parser.add_argument("--json", action="store_true", help="the result as JSON on standard output")


def _from_peft_parser(actions: "argparse._SubParsersAction[Parser]") -> None:
    parser = actions.add_parser(
        "from-peft",
        help="an adapter of PEFT as a checkpoint",
        description="Writes a checkpoint of adapters, which a run with the same lora.* trains on, and which generate, "
        "serve, to-hf and merge read as any other.",
        examples=["mq convert from-peft adapter start/adapter --base start/qwen2.5-7b"],
    )
    parser.add_argument("adapter", type=Path, help="directory with adapter_config.json and adapter_model.safetensors")
    parser.add_argument("out", type=Path, help="the directory to create")
    parser.add_argument("--base", type=Path, required=True, help="checkpoint of the base model (mq convert from-hf)")
    parser.add_argument("--restart", action="store_true", help="discard a different unfinished conversion to OUT")
    _common_options(parser)


def _merge_parser(actions: "argparse._SubParsersAction[Parser]") -> None:
    parser = actions.add_parser(
        "merge",
        help="adapters of a run with LoRA and their base as one checkpoint",
        description="Adds the adapters to the weights that they are for, in fp32, and writes a checkpoint of whole "
        "weights. (to-hf, generate, serve and eval take the checkpoint of adapters as it is.)",
        examples=["mq convert merge runs/lora start/merged", "mq convert merge start/adapter start/merged"],
    )
    parser.add_argument("checkpoint", type=Path, help="a run directory, a checkpoint root or one iteration")
    parser.add_argument("out", type=Path, help="the directory to create")
    parser.add_argument("--iteration", type=int, help="which checkpoint; default: the newest")
    parser.add_argument("--base", type=Path, help=_BASE_HELP)
    parser.add_argument("--dtype", choices=_DTYPES, help="default: the dtype of the base")
    parser.add_argument("--restart", action="store_true", help="discard a different unfinished conversion to OUT")
    _common_options(parser)


def _writing_options(parser: argparse.ArgumentParser, *, default: str) -> None:
    size_help = f"size of a file, such as 5GB or 200MB; a bare number is GB ({default})"
    parser.add_argument("--max-shard-size", type=str, metavar="SIZE", help=size_help)
    parser.add_argument("--restart", action="store_true", help="discard a different unfinished conversion to OUT")
    _common_options(parser)


def _common_options(parser: argparse.ArgumentParser) -> None:
    workers = max(1, min(4, os.cpu_count() or 1))
    parser.add_argument("--workers", type=int, default=workers, help="files or tensors in parallel (%(default)s)")
    parser.add_argument("--json", action="store_true", help="the result as JSON on standard output")


def size_in_bytes(text: str | None, *, option: str = "--max-shard-size") -> int | None:
    """``5GB``, ``200MB``, ``5`` (GB) as bytes.

    Raises:
        ConfigError: it is no size, or out of all proportion.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None or not 1 <= (size := float(match.group(1)) * unit) <= 1e15:
        raise ConfigError(Problem(option, text, "must be a size above 0, such as 5GB or 200MB."))
    return int(size)
