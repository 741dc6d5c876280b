"""``mq config``: the resolved configuration, what differs from the recipe, and the reference page."""

import argparse
import json
from collections.abc import Sequence

from megatron_qwen.cli import Parser, run_program
from megatron_qwen.config.checks import require_legal
from megatron_qwen.config.render import difference, dump, reference_page, to_yaml
from megatron_qwen.config.run import as_dict
from megatron_qwen.config.source import resolve
from megatron_qwen.errors import ConfigError
from megatron_qwen.recipes.registry import RECIPES


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        "mq config",
        description="Shows a run's configuration.",
        examples=[
            "mq config show qwen2_5_7b",
            "mq config show qwen2_5_7b parallel.tensor_model_parallel_size=4 --diff",
            "mq config show runs/first/run.yaml --json",
            "mq config reference > docs/configuration.md",
        ],
    )
    parser.add_argument(
        "action", choices=["show", "reference"], help="show a configuration, or print the page of all fields"
    )
    parser.add_argument("source", nargs="?", help="a recipe (mq recipes) or a run.yaml")
    parser.add_argument("--diff", action="store_true", help="only what differs from the recipe")
    parser.add_argument("--json", action="store_true", help="JSON instead of YAML")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Prints what was asked for."""
    options, overrides = parser().parse_known_args(arguments)
    if options.action == "reference":
        if options.source or overrides or options.json or options.diff:
            raise ConfigError("mq config reference takes nothing else.")
        print(reference_page(), end="")
        return 0
    if options.source is None:
        raise ConfigError("name a recipe or a run.yaml; `mq recipes` lists the recipes.")
    config = resolve(options.source, overrides, RECIPES)
    require_legal(config)
    if options.diff:
        base = RECIPES[config.recipe]() if config.recipe in RECIPES else config
        content = difference(config, base)
        print(json.dumps(content, indent=2) if options.json else dump(content), end="")
    else:
        print(json.dumps(as_dict(config), indent=2) if options.json else to_yaml(config), end="")
    return 0


if __name__ == "__main__":
    run_program(main)
