"""``mq convert``: between checkpoints and Hugging Face directories, and what there is to know of either."""

import argparse
import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from checkpoints_convert.arguments import TAKES_OVERRIDES, parser, size_in_bytes
from megatron_qwen import process_settings
from megatron_qwen.cli import run_program
from megatron_qwen.errors import ConfigError, Problem

if TYPE_CHECKING:
    from checkpoints_convert.conversion import Converted


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
        local_paths=options.local_paths,
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


def _verify(options: argparse.Namespace) -> int:
    from checkpoints_convert.compare.sides import open_side
    from checkpoints_convert.compare.tensor_difference import Difference
    from checkpoints_convert.compare.verify import compare_logits, verify

    if not 0 <= options.tolerance < 1:
        raise ConfigError(Problem("--tolerance", options.tolerance, "must be at least 0 and below 1."))
    how = {"iteration": options.iteration, "config": options.config, "overrides": options.overrides}
    a, b = open_side(options.a, **how, quantized=True), open_side(options.b, **how, quantized=True)
    verdict = verify(a, b, tolerance=options.tolerance, workers=options.workers, quiet=options.json)
    if options.logits:
        verdict.logits = compare_logits(a, b, prompts=options.prompt, dtype=options.dtype, quiet=options.json)
        if not verdict.logits.passes:
            verdict.differences.append(Difference("logits", options.dtype, str(verdict.logits)))
    print(json.dumps(verdict.as_json()) if options.json else verdict)
    return 0 if verdict.same else 1


def _inspect(options: argparse.Namespace) -> int:
    if (options.checkpoint / "config.json").is_file():
        from checkpoints_convert.compare.directory_inspection import inspect_directory

        if options.iteration is not None:
            fix = f"{options.checkpoint} is a Hugging Face directory, which has no iterations; omit this option."
            raise ConfigError(Problem("--iteration", options.iteration, fix))
        directory = inspect_directory(options.checkpoint)
        print(json.dumps(directory.as_json()) if options.json else directory)
        return 0
    from checkpoints_convert.compare.inspection import inspect

    found = inspect(options.checkpoint, iteration=options.iteration)
    print(json.dumps(found.as_json()) if options.json else found)
    return 0


def _diff(options: argparse.Namespace) -> int:
    from checkpoints_convert.compare.change import as_json, draw, measure, table
    from checkpoints_convert.compare.sides import open_side

    if options.png.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(Problem("--png", options.png, "must end in .png, .svg or .pdf."))
    if options.png.exists():
        raise ConfigError(Problem("--png", options.png, "already exists; name another file."))
    how = {"config": options.config, "overrides": options.overrides}
    a, b = open_side(options.a, **how), open_side(options.b, **how)
    changes = measure(a, b, workers=options.workers, quiet=options.json)
    draw(changes, options.png, title=f"{a.path.name} to {b.path.name}")
    print(json.dumps(as_json(changes)) if options.json else f"{table(changes)}\n\npicture: {options.png}")
    return 0


def _upcycle(options: argparse.Namespace) -> int:
    from checkpoints_convert.compare.sides import open_side
    from checkpoints_convert.upcycle import UpcycleOptions, upcycle
    from megatron_qwen.config.source import resolve
    from megatron_qwen.recipes.registry import RECIPES

    how = UpcycleOptions(
        seed=options.seed,
        router_std=options.router_std,
        routed_share=options.routed_share,
        compare=not options.no_logits,
        workers=options.workers,
        restart=options.restart,
        quiet=options.json,
    )
    if not 0 <= options.routed_share < 1:
        raise ConfigError(Problem("--routed-share", options.routed_share, "must be at least 0 and below 1."))
    recipe = resolve(options.recipe, options.overrides, RECIPES)
    done, report = upcycle(open_side(options.dense, config=options.config), options.out, recipe, how)
    if options.json:
        print(json.dumps({"source": str(options.dense), **done.as_json(), **report}))
        return 0
    _say(done, str(options.dense), as_json=False)
    answer = "yes, up to rounding" if report["exact"] else "nearly" if report["nearly"] else "no"
    print(f"gives the dense model's function: {answer}")
    print("\n".join(f"- {note}" for note in report["notes"]))
    if report["logits"]:
        found = report["logits"]
        print(
            f"measured: largest difference of a logit {found['max_abs_difference']:.2e} (rms {found['rms']:.2f}), "
            f"cosine {found['cosine']:.7f}, same argmax token at {found['top1_agreement']:.2%}"
        )
    return 0


def _quantize(options: argparse.Namespace) -> int:
    from checkpoints_convert.quantize.command import run

    return run(options)


def _to_peft(options: argparse.Namespace) -> int:
    from checkpoints_convert.checkpoint_source import open_checkpoint
    from checkpoints_convert.lora.to_peft import to_peft
    from checkpoints_convert.progress import gb

    source = open_checkpoint(options.checkpoint, iteration=options.iteration, merged=False)
    size = to_peft(source, options.out, base_name=options.base_name, local_paths=options.local_paths)
    said = {"source": str(source.path), "out": str(options.out), "weight_bytes": size}
    print(json.dumps(said) if options.json else f"{options.out}: {gb(size)} of adapters from {source.path}")
    return 0


def _from_peft(options: argparse.Namespace) -> int:
    from checkpoints_convert.checkpoint_source import open_checkpoint
    from checkpoints_convert.lora.from_peft import from_peft

    base = open_checkpoint(options.base)
    how = {"workers": options.workers, "restart": options.restart, "quiet": options.json}
    done = from_peft(options.adapter, base, options.out, **how)
    return _say(done, str(options.adapter), as_json=options.json)


def _merge(options: argparse.Namespace) -> int:
    from checkpoints_convert.checkpoint_source import open_checkpoint
    from checkpoints_convert.lora.merge import merge

    source = open_checkpoint(options.checkpoint, iteration=options.iteration, base=options.base)
    how = {"workers": options.workers, "restart": options.restart, "quiet": options.json}
    return _say(merge(source, options.out, dtype=options.dtype, **how), str(source.path), as_json=options.json)


def _say(done: "Converted", source: str, *, as_json: bool) -> int:
    from checkpoints_convert.progress import gb

    if as_json:
        print(json.dumps({"source": source, **done.as_json()}))
    elif done.complete_before:
        print(f"{done.out}: is already complete; every file matches its manifest")
    else:
        kept = f", {gb(done.kept_bytes)} of it kept from before" if done.kept_bytes else ""
        rate = (done.weight_bytes - done.kept_bytes) / max(done.seconds, 1e-9) / 1e9
        print(f"{done.out}: {gb(done.weight_bytes)} from {source}{kept} in {done.seconds:.1f} s, {rate:.2f} GB/s")
    return 0


_ACTIONS = {
    "to-hf": _to_hf,
    "from-hf": _from_hf,
    "verify": _verify,
    "inspect": _inspect,
    "diff": _diff,
    "upcycle": _upcycle,
    "to-peft": _to_peft,
    "from-peft": _from_peft,
    "merge": _merge,
    "quantize": _quantize,
}


def main(arguments: Sequence[str]) -> int:
    """Converts."""
    options, words = parser().parse_known_args(arguments)
    if any(word.startswith("-") for word in words) or (words and options.action not in TAKES_OVERRIDES):
        parser().error(f"unrecognized arguments: {' '.join(words)}")
    options.overrides = words
    if getattr(options, "workers", 1) < 1:
        raise ConfigError(Problem("--workers", options.workers, "must be at least 1."))
    if hasattr(options, "max_shard_size"):
        size_in_bytes(options.max_shard_size)
    process_settings.keep_freed_memory()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("checkpoints_convert").setLevel(logging.INFO)
    try:
        return _ACTIONS[options.action](options)
    except KeyboardInterrupt:
        if hasattr(options, "out"):
            logging.getLogger(__name__).warning("interrupted; run the same command again to resume")
        raise


if __name__ == "__main__":
    run_program(main)
