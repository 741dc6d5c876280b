"""``mq bench``: runs a benchmark and its peer in one go and prints the ratio."""

import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_qwen.cli import Parser, run_program
from megatron_qwen.errors import ConfigError

_NAMES = {
    "train_step": "a training step against transformers + fused AdamW, fp32 and bf16",
    "layer": "a dense and an MoE layer, forward and backward, against transformers' of the same shape",
    "sft": "fine-tuning on packed conversations, tokens a second against TRL's SFTTrainer",
    "generate": "prompts and tokens a second against transformers' generate, batch 1, 8 and 32",
    "collectives": "collectives of training between ranks of this machine against a copy in memory",
    "checkpoint": "a step during a save against a normal one, a save against cp of its files",
    "card": "what keeping the performance card costs a step against 1 percent",
    "stragglers": "what comparing the ranks costs a step against 1 percent, and the scores of 1,024 ranks",
    "integrity": "what the checks of weights, optimizer state and spikes cost a step against 1 percent",
    "startup": "mq --help, mq train --help, mq config show against 0.5 s",
    "convert": "a 7B-shaped model to a checkpoint and back against cp, and the memory of both (50 GB in TMPDIR)",
    "quantize": "quantized releases of a 7B-shaped slice against to-hf of it, and their memory (10 GB in TMPDIR)",
    "quantize_quality": "perplexity and KL of every quantized format of two models trained here, against theirs",
    "quantize_time": "hours of GPTQ for a 7B on this machine, predicted from a measured layer of its widths",
    "launch": "mq launch dry-run of a 72B against 1.5 s, mq launch status over 500 runs against 2 s",
    "restart": "seconds from a fault to the next step, inside the allocation against a requeue (needs Slurm)",
    "data_prepare": "text to tokens against a stock loop and gigatoken alone, and its memory (8 GB in TMPDIR)",
    "chat_prepare": "a million conversations to tokens against transformers' loop, and its memory (4 GB in TMPDIR)",
    "data_start": "first batch over 2,000 sources against 2 s and 200 MiB, and against megatron-core's GPTDataset",
    "contamination": "100 million tokens of a run searched for the items of a test, against a minute",
    "loader": "tokens read and collated on one core against 20 million a second",
    "gpu_step": "steps of Qwen2.5 shapes on one GPU against its peak, FP8 against bf16, te against torch",
    "peaks": "peak rates of GEMMs, attention and copies on this machine against its data sheet",
    "predictions": "predicted tokens/s against published and measured ones, within a ratio of 0.85",
    "sweep_fit": "the fit of 10,000 cells with 1,000 bootstrap resamples against 60 s",
    "sweep_report": "opening the page of a study of 1,000 cells against 2 s, and its size against 5 MB",
    "sample_order": "first sample of 10^12 tokens against 10 ms, and its memory",
}


def main(arguments: Sequence[str]) -> int:
    """Prints the rows; exit 1 where a required ratio is missed."""
    parser = Parser(
        "mq bench",
        description="Measures this project against a peer or a limit, both in one run, and prints the ratio.",
        examples=["mq bench train_step", "mq bench train_step --rounds 9 --json", "mq bench startup"],
    )
    parser.add_argument(
        "name", choices=list(_NAMES), help="; ".join(f"{name}: {text}" for name, text in _NAMES.items())
    )
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (%(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="training steps per round of train_step (%(default)s)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path, help="also write the rows to this file, as JSON")
    parser.add_argument("--hardware", type=Path, help="peaks: also write them as a file that mq plan --gpu takes")
    options = parser.parse_args(arguments)
    if options.hardware is not None and options.name != "peaks":
        raise ConfigError("--hardware requires the benchmark peaks.")
    if options.rounds < 1 or options.steps < 1:
        raise ConfigError("--rounds and --steps must be at least 1.")
    module = importlib.import_module(f"tools.dev.benchmarks.{options.name}")
    more = {"train_step": {"steps": options.steps}, "peaks": {"hardware": options.hardware}}
    rows = module.run(rounds=options.rounds, **more.get(options.name, {}))
    text = json.dumps([asdict(row) for row in rows], indent=2)
    print(text if options.json else "\n".join(map(str, rows)))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n")
    return 0 if all(row.passes for row in rows) else 1


if __name__ == "__main__":
    run_program(main)
