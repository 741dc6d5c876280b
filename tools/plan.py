"""``mq plan``: which layouts a model can have on a number of GPUs, and what each needs and reaches."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_qwen.cli import Parser, run_program
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.source import resolve
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.estimate.adapters import described
from megatron_qwen.estimate.assumptions import Assumptions
from megatron_qwen.estimate.hardware import KINDS, Hardware
from megatron_qwen.estimate.hardware_file import find_hardware
from megatron_qwen.estimate.layouts import LayoutEstimate, RejectedLayout, layouts
from megatron_qwen.estimate.speed import why_not
from megatron_qwen.recipes.registry import RECIPES
from tools.calibration import calibration_report
from tools.recipes import layout_name


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        "mq plan",
        description="Ranks the layouts of a recipe by predicted tokens per second, and gives the reason why "
        "others are rejected. The model, the sequence length and the global batch are the recipe's, unless overridden.",
        examples=[
            "mq plan qwen2_5_72b --gpus 1024 --gpu h100",
            "mq plan qwen2_5_7b --gpus 64 --gpu h200 --precision fp8 --png memory.png",
            "mq plan qwen2_57b_a14b --gpus 256 --gpu h100 --rejected",
            "mq launch submit qwen2_5_7b $(mq plan qwen2_5_7b --gpus 64 --gpu h200 --emit) --nodes 8",
            "mq plan --calibrate runs/7b --gpu h200",
            "mq plan demo --gpus 1 --gpu this_machine.yaml precision.dtype=bf16",
        ],
    )
    parser.add_argument("source", nargs="?", help="a recipe or a run.yaml; then section.field=value overrides")
    parser.add_argument("--gpus", type=int, help="devices")
    kinds = f"{', '.join(KINDS)}, or a file that mq bench peaks wrote"
    parser.add_argument("--gpu", default="h100", help=f"kind of device: {kinds} (%(default)s)")
    parser.add_argument("--sequence-length", type=int, help="instead of the recipe's")
    parser.add_argument("--precision", choices=["bf16", "fp8"], help="default: the recipe's; fp8 is tensorwise")
    assumed = Assumptions()
    reached = "achieved fraction of the device's peak rates (%(default)g)"
    parser.add_argument("--achieved", type=float, default=assumed.achieved, help=reached)
    busiest = "tokens of the busiest expert rank / the mean (%(default)g)"
    parser.add_argument("--imbalance", type=float, default=assumed.imbalance, help=busiest)
    parser.add_argument("--top", type=int, default=10, help="layouts shown (%(default)s)")
    parser.add_argument("--rejected", action="store_true", help="show every rejected layout with its reason")
    parser.add_argument("--emit", action="store_true", help="print the best layout as overrides, nothing else")
    parser.add_argument("--png", type=Path, help="draw the memory of the layouts shown")
    parser.add_argument("--calibrate", type=Path, nargs="+", metavar="RUN", help="fit --achieved to finished runs")
    parser.add_argument("--json", action="store_true")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Prints the plan; exit 2 where no layout fits."""
    options, overrides = parser().parse_known_args(arguments)
    device = find_hardware(options.gpu)
    if options.calibrate:
        print(calibration_report(options.calibrate, device, as_json=options.json))
        return 0
    if options.source is None or options.gpus is None or options.gpus < 1 or options.top < 1:
        raise ConfigError("mq plan needs a recipe or run.yaml, --gpus of at least 1 and --top of at least 1.")
    config = _config(options, overrides)
    if not options.imbalance >= 1:
        raise ConfigError(
            Problem(
                "--imbalance", options.imbalance, "is the ratio of the busiest rank to the mean; it must be at least 1."
            )
        )
    if not 0 < options.achieved <= 1.5:
        raise ConfigError(Problem("--achieved", options.achieved, "must be above 0 and at most 1.5."))
    assumptions = Assumptions(imbalance=options.imbalance, achieved=options.achieved)
    found, rejected = layouts(config, world_size=options.gpus, device=device, assumptions=assumptions)
    if not found:
        raise ConfigError(Problem("--gpus", f"{options.gpus} x {device.name}", _why_none(rejected, device)))
    shown = found[: options.top]
    if options.png is not None:
        _draw(shown, device, options.png)
    if options.emit:
        print(" ".join(_overrides(found[0])))
    elif options.json:
        print(json.dumps(_document(shown, rejected, device, options.gpus, assumptions), indent=2))
    else:
        _print(shown, found, rejected, device, options)
    return 0


def _config(options: argparse.Namespace, overrides: Sequence[str]) -> RunConfig:
    config = resolve(options.source, list(overrides), RECIPES)
    if options.sequence_length is not None:
        if options.sequence_length < 2:
            raise ConfigError(Problem("--sequence-length", options.sequence_length, "must be at least 2."))
        config = config.with_section("data", seq_length=options.sequence_length)
    if options.precision is not None:
        config = config.with_section("precision", fp8="tensorwise" if options.precision == "fp8" else None)
    if config.data.blend is not None:
        fix = "has data stages with their own length and batch; plan each with data.seq_length and its batch."
        raise ConfigError(Problem("data.blend", config.data.blend, fix))
    if reason := why_not(config, find_hardware(options.gpu)):
        raise ConfigError(Problem(config.recipe, None, reason))
    return config


def _why_none(rejected: Sequence[RejectedLayout], device: Hardware) -> str:
    """The nearest that a layout came: the least memory of those that are legal, else the simplest one's reason."""
    needs = [one for one in rejected if one.need_gib is not None]
    if needs:
        least = min(needs, key=lambda one: one.need_gib or 0.0)
        layout = layout_name(least.config.parallel)
        return (
            f"cannot hold this model in any layout: the smallest needs {least.need_gib:.0f} GiB of "
            f"{device.memory_gib:.0f} ({layout}, {_kept(least.config)}); use more devices or a shorter sequence."
        )
    simplest = min(rejected, key=lambda one: one.config.parallel.model_parallel_size)
    return f"have no legal layout; the simplest one, {layout_name(simplest.config.parallel)}, says: {simplest.reason}"


def _optimizer(config: RunConfig) -> str:
    return "precision-aware" if config.precision.use_precision_aware_optimizer else "standard"


def _kept(config: RunConfig) -> str:
    """What decides a layout's memory in addition to its sizes, in words."""
    recompute = config.training.recompute_granularity
    words = [f"batch {config.training.micro_batch_size}"]
    words += [f"{recompute} recompute"] if recompute not in (None, "none") else []
    words += ["precision-aware optimizer"] if config.precision.use_precision_aware_optimizer else []
    return ", ".join(words)


def _overrides(candidate: LayoutEstimate) -> list[str]:
    """What makes the recipe this layout."""
    config = candidate.config
    parallel, training = config.parallel, config.training
    selective = training.recompute_granularity == "selective"
    words = {
        "parallel.tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "parallel.sequence_parallel": str(parallel.sequence_parallel).lower(),
        "parallel.pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "parallel.virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size or "null",
        "parallel.context_parallel_size": parallel.context_parallel_size,
        "parallel.expert_model_parallel_size": parallel.expert_model_parallel_size,
        "parallel.expert_tensor_parallel_size": parallel.expert_tensor_parallel_size or "null",
        "parallel.num_layers_in_first_pipeline_stage": "null",
        "parallel.num_layers_in_last_pipeline_stage": "null",
        "training.micro_batch_size": training.micro_batch_size,
        "parallel.overlap_grad_reduce": str(parallel.overlap_grad_reduce).lower(),
        "parallel.overlap_param_gather": str(parallel.overlap_param_gather).lower(),
        "training.recompute_granularity": training.recompute_granularity,
        "training.recompute_method": training.recompute_method,
        "training.recompute_num_layers": training.recompute_num_layers,
        **({"training.recompute_modules": f"[{','.join(training.recompute_modules)}]"} if selective else {}),
        "precision.use_precision_aware_optimizer": str(bool(config.precision.use_precision_aware_optimizer)).lower(),
        "data.seq_length": config.data.seq_length,
        "precision.fp8": config.precision.fp8 or "null",
    }
    return [f"{name}={value}" for name, value in words.items()]


def _row(candidate: LayoutEstimate) -> dict[str, Any]:
    config, time = candidate.config, candidate.time
    return {
        "layout": layout_name(config.parallel),
        "micro_batch_size": config.training.micro_batch_size,
        "recompute": config.training.recompute_granularity,
        "optimizer": _optimizer(config),
        "memory_gib": round(candidate.memory_gib, 2),
        "bubble": round(candidate.bubble, 4),
        "step_s": round(time.seconds, 4),
        "tokens_per_second_per_device": round(candidate.tokens_per_second, 1),
        "mfu": round(candidate.mfu, 4),
    }


def _document(
    shown: Sequence[LayoutEstimate],
    rejected: Sequence[RejectedLayout],
    device: Hardware,
    gpus: int,
    assumptions: Assumptions,
) -> dict[str, Any]:
    return {
        "gpus": gpus,
        "device": asdict(device),
        "assumptions": asdict(assumptions),
        "layouts": [
            _row(candidate)
            | {
                "time_s": asdict(candidate.time),
                "stages": [asdict(stage) for stage in candidate.memory],
                "overrides": _overrides(candidate),
            }
            for candidate in shown
        ],
        "rejected": [
            {
                "layout": layout_name(one.config.parallel),
                "micro_batch_size": one.config.training.micro_batch_size,
                "recompute": one.config.training.recompute_granularity,
                "optimizer": _optimizer(one.config),
                "reason": one.reason,
            }
            for one in rejected
        ],
    }


def _print(
    shown: Sequence[LayoutEstimate],
    found: Sequence[LayoutEstimate],
    rejected: Sequence[RejectedLayout],
    device: Hardware,
    options: argparse.Namespace,
) -> None:
    config = shown[0].config
    precision = f"FP8 {config.precision.fp8}" if config.precision.fp8 else config.precision.dtype
    if adapters := described(config):
        print(adapters)
    print(
        f"{config.recipe} on {options.gpus} x {device.name} ({device.source}): {precision}, sequence "
        f"{config.data.seq_length}, {config.training.global_batch_size} sequences a step"
    )
    print(
        f"{'layout':<22}{'batch':>6}{'recompute':>11}{'optimizer':>17}"
        f"{'GiB':>8}{'bubble':>8}{'step s':>9}{'tokens/s/GPU':>14}{'MFU':>7}"
    )
    for candidate in shown:
        row = _row(candidate)
        print(
            f"{row['layout']:<22}{row['micro_batch_size']:>6}{row['recompute']:>11}{row['optimizer']:>17}"
            f"{row['memory_gib']:>8.1f}"
            f"{row['bubble']:>8.1%}{row['step_s']:>9.2f}{row['tokens_per_second_per_device']:>14,.0f}{row['mfu']:>7.1%}"
        )
    print(
        f"{len(found)} layouts fit, {len(rejected)} do not" + ("" if options.rejected else " (--rejected names them)")
    )
    if options.rejected:
        for one in rejected:
            print(f"  {layout_name(one.config.parallel)}, {_kept(one.config)}: {one.reason}")


def _draw(shown: Sequence[LayoutEstimate], device: Hardware, path: Path) -> None:
    """Stacked bars: memory of the fullest stage of each layout, by part."""
    from matplotlib.figure import Figure

    from megatron_qwen.estimate.memory import ALLOWANCE_GIB

    figure = Figure(figsize=(9, 0.5 * len(shown) + 1.6), layout="constrained")
    axes = figure.add_subplot()
    fullest = [max(candidate.memory, key=lambda stage: stage.total_gib) for candidate in shown]
    names = [f"{layout_name(c.config.parallel)}, {_kept(c.config)}" for c in shown]
    left = [0.0] * len(shown)
    parts = {
        part: [getattr(stage, part) / 2**30 for stage in fullest]
        for part in ("weights", "gradients", "optimizer", "activations", "loss")
    }
    parts["context, buffers"] = [ALLOWANCE_GIB] * len(shown)
    rows = list(range(len(shown)))
    for part, sizes in parts.items():
        axes.barh(rows, sizes, left=left, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.set_yticks(rows, names)
    axes.axvline(
        device.memory_gib, color="black", linestyle="--", linewidth=1, label=f"memory of the {device.name.upper()}"
    )
    axes.invert_yaxis()
    axes.set_xlabel("GiB of a rank of the fullest stage")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_program(main)
