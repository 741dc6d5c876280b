"""``mq recipes``: the table of recipes."""

import json
from collections.abc import Sequence
from typing import Any

from megatron_qwen.cli import Parser, run_program
from megatron_qwen.config.sections import ParallelConfig
from megatron_qwen.estimate.parameters import count_parameters
from megatron_qwen.recipes.registry import RECIPES


def layout_name(parallel: ParallelConfig) -> str:
    """A layout in the field's short form, such as ``TP8+SP PP4x5 EP8``."""
    parts = []
    if parallel.tensor_model_parallel_size > 1:
        parts.append(f"TP{parallel.tensor_model_parallel_size}" + ("+SP" if parallel.sequence_parallel else ""))
    if parallel.pipeline_model_parallel_size > 1:
        virtual = f"x{parallel.virtual_stages}" if parallel.virtual_stages > 1 else ""
        parts.append(f"PP{parallel.pipeline_model_parallel_size}{virtual}")
    if parallel.context_parallel_size > 1:
        parts.append(f"CP{parallel.context_parallel_size}")
    if parallel.expert_model_parallel_size > 1:
        parts.append(f"EP{parallel.expert_model_parallel_size}")
    return " ".join(parts) or "one device"


def rows() -> list[dict[str, Any]]:
    """A row for every recipe."""
    table = []
    for name, recipe in RECIPES.items():
        config = recipe()
        count = count_parameters(config.model)
        table.append(
            {
                "recipe": name,
                "parameters": count.total,
                "active": count.active,
                "layers": config.model.num_layers,
                "layout": layout_name(config.parallel),
                "what": (recipe.__doc__ or "").strip().splitlines()[0],
            }
        )
    return table


def main(arguments: Sequence[str]) -> int:
    """Prints the table."""
    parser = Parser("mq recipes", description="Lists the recipes.", examples=["mq recipes", "mq recipes --json"])
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    options = parser.parse_args(arguments)
    table = rows()
    if options.json:
        print(json.dumps(table, indent=2))
        return 0
    width = max(len(name) for name in RECIPES) + 1
    print(f"{'recipe':<{width}}{'parameters':>16}{'active':>16}{'layers':>8}  {'layout':<20}what")
    for row in table:
        print(
            f"{row['recipe']:<{width}}{row['parameters']:>16,}{row['active']:>16,}{row['layers']:>8}  "
            f"{row['layout']:<20}{row['what']}"
        )
    return 0


if __name__ == "__main__":
    run_program(main)
