"""``mq data plan``: what a run will read, stage by stage, before anything runs."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict


def main(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Shows the plan of a recipe with its blend."""
    from megatron_qwen.config.source import resolve
    from megatron_qwen.data.reading.preflight import require_usable
    from megatron_qwen.data.reading.reading_plan import plan, warnings
    from megatron_qwen.recipes.registry import RECIPES

    data = require_usable(resolve(options.source, overrides, RECIPES))
    stages = plan(data)
    found = warnings(data, stages)
    if options.json:
        content = {"stages": [asdict(stage) for stage in stages], "warnings": [str(problem) for problem in found]}
        print(json.dumps(content, indent=2))
        return 0
    for stage in stages:
        print(
            f"stage {stage.name}: {stage.steps:,} steps of {stage.global_batch_size:,} samples, "
            f"{stage.tokens:,} tokens, {stage.seq_length:,} tokens a sample, RoPE base {stage.rotary_base:,.0f}"
        )
        print(f"  {'source':<24}{'weight':>8}{'tokens':>20}{'epochs':>9}{'in all':>9}")
        for share in stage.sources:
            print(
                f"  {share.name:<24}{100 * share.weight:>7.2f}%{share.tokens:>20,}{share.epochs:>9.3f}"
                f"{share.epochs_so_far:>9.3f}"
            )
    for problem in found:
        print(f"warning: {problem}")
    return 0
