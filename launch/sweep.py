"""``mq sweep``: scaling-law studies."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_qwen.cli import Parser, run_program
from megatron_qwen.config.source import resolve
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.estimate.hardware import Hardware, hardware
from megatron_qwen.estimate.hardware_file import read_hardware
from megatron_qwen.estimate.speed import why_not
from megatron_qwen.recipes.registry import RECIPES

_TAKES_OVERRIDES = ("prescribe",)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        "mq sweep",
        description="Scaling laws: plans a study under a budget, fits what trained models have shown, and "
        "prescribes the run of a larger one.",
        examples=[
            "mq sweep plan study.yaml",
            "mq sweep fit runs.csv --output fit.json",
            "mq sweep prescribe fit.json --params 7e9 --tokens 1e12 --recipe qwen2_5_7b --gpus 512 --output run.yaml",
            "mq sweep prescribe fit.json --gpu-hours 20000 --recipe qwen2_5_7b --gpus 64 --gpu h200",
        ],
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    plan = actions.add_parser(
        "plan",
        description="Expands a study into cells with parameters, FLOPs, hours, memory and a legal layout each, drops "
        "what its budget does not allow, and writes the plan for review.",
        examples=["mq sweep plan study.yaml", "mq sweep plan study.yaml --output plan.yaml --json"],
        help="the cells of a study and what they cost",
    )
    plan.add_argument("study", type=Path, help="a study file (docs/scaling_laws.md)")
    plan.add_argument("--output", type=Path, help="where the plan is written; beside the study as NAME.plan.yaml")
    plan.add_argument("--json", action="store_true")
    fit = actions.add_parser(
        "fit",
        description="Fits learning rate, batch and loss over model size and tokens, with intervals and the error of "
        "predicting the largest size from the others.",
        examples=["mq sweep fit runs.csv", "mq sweep fit runs.csv --embeddings in --draws 4000 --json"],
        help="laws from a CSV",
    )
    fit.add_argument(
        "source",
        type=Path,
        help="a CSV with params, tokens, loss, and as far as known learning_rate, batch_tokens, status, "
        "embedding_params, total_params, granularity, name",
    )
    fit.add_argument("--output", type=Path, help="where the fit is written; beside the CSV as NAME.fit.json")
    fit.add_argument("--embeddings", choices=["out", "in"], default="out", help="whether N counts embeddings (out)")
    fit.add_argument("--draws", type=int, default=1000, help="versions of the data behind every interval (1000)")
    fit.add_argument("--seed", type=int, default=0, help="of their drawing (0)")
    fit.add_argument("--delta", type=float, default=1e-3, help="of the Huber loss of ln L (0.001)")
    within = "how far above the best, in ln L, settings are described by a quadratic (0.01)"
    fit.add_argument("--window", type=float, default=0.01, help=within)
    fit.add_argument("--json", action="store_true")
    prescribe = actions.add_parser(
        "prescribe",
        description="The run.yaml for a size and its tokens, or for a budget: shape, learning rate, batch, layout and "
        "predicted loss, every number with its origin.",
        examples=["mq sweep prescribe fit.json --params 7e9 --tokens 1e12 --recipe qwen2_5_7b --gpus 512 --gpu h100"],
        help="a run.yaml from a fit",
    )
    prescribe.add_argument("fit", type=Path, help="what mq sweep fit has written")
    prescribe.add_argument("--recipe", required=True, help="recipe or run.yaml of the family; then section.field=value")
    prescribe.add_argument("--params", type=float, help="parameters, counted as the fit counts them")
    prescribe.add_argument("--tokens", type=float, help="tokens to train on")
    prescribe.add_argument("--gpu-hours", type=float, help="a budget, instead of --params and --tokens")
    prescribe.add_argument("--gpus", type=int, required=True, help="devices")
    prescribe.add_argument("--gpu", default="h100", help="kind of device, or a file that mq bench ceilings wrote")
    beyond = "compute over the largest fitted one that is refused (1000)"
    prescribe.add_argument("--refuse-factor", type=float, default=1000.0, help=beyond)
    prescribe.add_argument("--output", type=Path, help="where run.yaml is written; it is printed otherwise")
    prescribe.add_argument("--json", action="store_true")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Does what was asked for."""
    options, overrides = parser().parse_known_args(arguments)
    if overrides and options.action not in _TAKES_OVERRIDES:
        raise ConfigError(f"unrecognized arguments: {' '.join(overrides)}. See mq sweep {options.action} --help.")
    actions: dict[str, Callable[[argparse.Namespace, list[str]], int]] = {
        "plan": _plan,
        "fit": _fit,
        "prescribe": _prescribe,
    }
    return actions[options.action](options, overrides)


def _plan(options: argparse.Namespace, _: list[str]) -> int:
    output = options.output or options.study.with_suffix(".plan.yaml")
    if not output.parent.is_dir():
        raise ConfigError(Problem("--output", output, "lies in a folder that does not exist; make it first."))
    from tools.scaling import plan
    from tools.scaling.study import read_study

    content = plan.document(plan.make_plan(read_study(options.study)))
    plan.write(output, content)
    if options.json:
        print(json.dumps(content, indent=1))
    else:
        print(plan.table(content), f"written: {output}", sep="\n")
    return 0


def _fit(options: argparse.Namespace, _: list[str]) -> int:
    problems = [
        Problem(f"--{name}", value, "must be above 0.")
        for name, value in (("draws", options.draws), ("delta", options.delta), ("window", options.window))
        if not 0 < value < float("inf")
    ]
    if options.seed < 0:
        problems.append(Problem("--seed", options.seed, "must be at least 0."))
    output = options.output or options.source.with_suffix(".fit.json")
    if not output.parent.is_dir():
        problems.append(Problem("--output", output, "lies in a folder that does not exist; make it first."))
    if problems:
        raise ConfigError(problems)
    from tools.scaling import fit_file
    from tools.scaling.fit import Settings, fit
    from tools.scaling.observations import read_csv

    settings = Settings(options.embeddings == "in", options.draws, options.seed, options.delta, options.window)
    content = fit_file.document(fit(read_csv(options.source), settings), source=str(options.source.absolute()))
    fit_file.write(output, content)
    if options.json:
        print(json.dumps(content, indent=1))
    else:
        print(fit_file.table(content), f"written: {output}", sep="\n")
    return 0


def _prescribe(options: argparse.Namespace, overrides: list[str]) -> int:
    _require_wish(options)
    base = resolve(options.recipe, overrides, RECIPES)
    device = _device(options.gpu)
    if reason := why_not(base, device):
        raise ConfigError(Problem(base.recipe, None, reason))
    if base.data.blend is not None:
        raise ConfigError(Problem("data.blend", base.data.blend, "has stages of its own; prescribe a run without one."))
    from tools.scaling.fit_file import FitFile
    from tools.scaling.prescribe import Wish, prescribe

    wish = Wish(base, options.params, options.tokens, options.gpu_hours, options.gpus, device, options.refuse_factor)
    found = prescribe(FitFile(options.fit), wish)
    text = found.yaml()
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if options.json:
        print(json.dumps(_document(found), indent=1))
    elif options.output is None:
        print(text, end="")
    else:
        print(_summary(found, options.output))
    return 0


def _require_wish(options: argparse.Namespace) -> None:
    problems = [
        Problem(f"--{name.replace('_', '-')}", value, "must be a number above 0.")
        for name in ("params", "tokens", "gpu_hours", "gpus", "refuse_factor")
        if (value := getattr(options, name)) is not None and not 0 < value < float("inf")
    ]
    sized = options.params is not None and options.tokens is not None
    if (options.gpu_hours is None) != sized or (options.gpu_hours is not None and (options.params or options.tokens)):
        problems.append(Problem("mq sweep prescribe", None, "needs --params and --tokens, or --gpu-hours alone."))
    if problems:
        raise ConfigError(problems)


def _device(name: str) -> Hardware:
    is_file = name.endswith((".yaml", ".yml")) or "/" in name or Path(name).is_file()
    return read_hardware(Path(name)) if is_file else hardware(name)


def _document(found: Any) -> dict[str, Any]:
    return {
        "params": found.params,
        "tokens": found.tokens,
        "loss": found.loss,
        "interval": found.interval,
        "hours": found.hours,
        "beyond": found.beyond,
        "warnings": found.warnings,
        "origins": found.origins,
        "tokens_per_second_per_device": found.layout.tokens_per_second,
        "memory_gib": found.layout.memory_gib,
        "run_yaml": found.yaml(),
    }


def _summary(found: Any, output: Path) -> str:
    model, optim, training = found.config.model, found.config.optim, found.config.training
    step = training.global_batch_size * found.config.data.seq_length
    loss = "is not predicted"
    if found.loss is not None:
        loss = f"is predicted as {found.loss:.4f} ({found.interval[0]:.4f} to {found.interval[1]:.4f})"
    return "\n".join(
        [
            f"N {found.params:.4g}, D {found.tokens:.4g}: {model.num_layers} layers, hidden {model.hidden_size}, "
            f"FFN {model.ffn_hidden_size}",
            f"learning rate {optim.learning_rate:.3g}, {training.global_batch_size} sequences a step "
            f"({step:.3g} tokens), {training.train_iters} steps",
            f"loss {loss}; {found.hours:.3g} h at {found.layout.tokens_per_second:,.0f} tokens/s a device",
            f"written: {output}",
        ]
    )


if __name__ == "__main__":
    run_program(main)
