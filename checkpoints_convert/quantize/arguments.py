"""The command line of ``mq convert quantize``; imports no torch, so that --help answers at once."""

import argparse
from pathlib import Path

from checkpoints_convert.quantize.names import (
    DEFAULT_METHODS,
    GGUF_KINDS,
    METHODS,
    NEAREST,
    SAFETENSORS_FORMATS,
    Wanted,
    wanted_formats,
)
from megatron_qwen.cli import Parser
from megatron_qwen.errors import ConfigError, Problem

GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP = 128


def quantize_parser(actions: "argparse._SubParsersAction[Parser]") -> Parser:
    """The sub-parser, without the options that all conversions share."""
    parser = actions.add_parser(
        "quantize",
        help="a release in quantized formats (GPTQ, AWQ, FP8, int8, GGUF)",
        description="Writes directories that transformers, vLLM and others load, with int4, int8 or FP8 weights: "
        "config.json, tokenizer, model card and a manifest of hashes. It appears only when it is complete; after a "
        "kill the same command resumes. SOURCE is a run, a checkpoint of any layout, or a Hugging Face directory.",
        examples=[
            "mq convert quantize runs/first out/first-fp8 --format fp8",
            "mq convert quantize runs/first out/first --format gptq-int4,awq-int4,gguf:Q8_0,Q4_K_M",
            "mq convert quantize Qwen2.5-72B out/72b-int4 --format gptq-int4 --calibrate texts/ --pad-ffn auto",
        ],
    )
    parser.add_argument("source", type=Path, help="run, checkpoint root, one iteration, or Hugging Face directory")
    parser.add_argument("out", type=Path, help="the directory to create; of several formats a folder with one each")
    parser.add_argument(
        "--format",
        metavar="NAME[,NAME...]",
        help=f"{', '.join(SAFETENSORS_FORMATS)}, or gguf:KIND[,KIND...] of {', '.join(GGUF_KINDS)}",
    )
    parser.add_argument("--all", action="store_true", help="every format, and a table of them")
    defaults = ", ".join(f"{method} for {name}" for name, method in DEFAULT_METHODS.items() if method != NEAREST)
    parser.add_argument("--method", choices=METHODS, help=f"what makes the values; default: {defaults}, else {NEAREST}")
    _calibration_options(parser)
    parser.add_argument("--iteration", type=int, help="which checkpoint; default: the newest")
    parser.add_argument(
        "--config",
        help="recipe or run.yaml, for a checkpoint of Megatron-LM or Megatron-Bridge; followed by section.field=value "
        "overrides",
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer directory; default: the source's")
    parser.add_argument("--license", help="licence in the model card, such as apache-2.0")
    parser.add_argument(
        "--dtype",
        choices=["bf16", "fp16", "fp32"],
        help="of embeddings, norms and biases; default: fp16 for GPTQ and AWQ, as readers want it, else bf16",
    )
    parser.add_argument(
        "--pad-ffn",
        metavar="WIDTH",
        help="widen the feed-forward with zeros so that tensor parallelism can cut it: auto, a width, or EXPERT,SHARED",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        default=DEFAULT_GROUP,
        help="inputs that share a scale in int4 and GPTQ formats (%(default)s)",
    )
    parser.add_argument("--asymmetric", action="store_true", help="GPTQ with zero points, written as gptq_v2")
    parser.add_argument("--act-order", action="store_true", help="GPTQ in the order of the inputs' importance")
    parser.add_argument("--fp8-blocks", action="store_true", help="fp8 with scales of blocks, not of rows")
    return parser


def _calibration_options(parser: Parser) -> None:
    data = "by default samples of what the run itself has read"
    parser.add_argument(
        "--calibrate",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help=f"file or folder of texts to calibrate on, may be repeated; {data}",
    )
    parser.add_argument(
        "--calibrate-chats",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="the same of conversations: JSON lines with messages, in the tokenizer's chat template",
    )
    parser.add_argument(
        "--calibrate-tokens",
        type=Path,
        metavar="PREFIX",
        help="the same of a token file, or set of shards, made with the model's tokenizer",
    )
    parser.add_argument("--samples", type=int, default=512, help="samples of calibration data (%(default)s)")
    length = "tokens of a sample; default: 2048, or the model's positions if they are fewer"
    parser.add_argument("--sample-length", type=int, help=length)
    parser.add_argument("--damping", type=float, default=0.01, help="of GPTQ, in units of the mean (%(default)g)")
    parser.add_argument("--alpha", type=float, default=0.5, help="of SmoothQuant (%(default)g)")
    memory = (
        "for hidden states and Hessians, such as 32GB; hidden states of more than a quarter go to the disk beside OUT"
    )
    parser.add_argument("--calibration-memory", metavar="SIZE", help=f"{memory} (half of what is free)")
    parser.add_argument("--importance", action="store_true", help="GGUF with an importance matrix of the same data")


def wanted(options: argparse.Namespace) -> Wanted:
    """What is to be written, and whether the options have a use for it.

    Args:
        options: of the command line.

    Raises:
        ConfigError: with all mistakes.
    """
    if (options.format is None) == (not options.all):
        fix = f"name formats ({', '.join(SAFETENSORS_FORMATS)}), or --all of them; one of the two."
        raise ConfigError(Problem("--format", options.format, fix))
    if options.all:
        found = Wanted(SAFETENSORS_FORMATS, GGUF_KINDS)
    else:
        found = wanted_formats(options.format)
    problems = []
    has_gptq = any(name.startswith("gptq") for name in found.formats)
    for flag, given in (("--asymmetric", options.asymmetric), ("--act-order", options.act_order)):
        if given and not has_gptq:
            problems.append(Problem(flag, None, "is an option of gptq-int4 and gptq-int8; omit it."))
    if options.act_order and has_gptq and options.method == NEAREST:
        fix = "needs the importance of inputs, which rounding to nearest does not know: omit it, or --method."
        problems.append(Problem("--act-order", None, fix))
    if options.importance and not found.gguf_kinds:
        problems.append(Problem("--importance", None, "is an option of GGUF; omit it."))
    problems += [
        Problem(flag, value, "must be at least 1.")
        for flag, value in (("--samples", options.samples), ("--sample-length", options.sample_length))
        if value is not None and value < 1
    ]
    if options.fp8_blocks and "fp8" not in found.formats:
        problems.append(Problem("--fp8-blocks", None, "is an option of fp8; fp8-block has blocks always. Omit it."))
    if problems:
        raise ConfigError(problems)
    return found
