"""Options of programs that load a model: which one, and how."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.generation.loaded import LoadOptions


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds them; SOURCE and the words of the layout are each program's own."""
    parser.add_argument("--iteration", type=int, help="which checkpoint of a run; default: the newest")
    parser.add_argument("--config", help="recipe or run.yaml of a checkpoint that another program wrote")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer directory; default: the source's")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="to compute in; default: that of the weights")
    parser.add_argument("--context", type=int, help="positions of prompt and answer; default: all that the model has")


def load_options(options: argparse.Namespace, *, sequences: int = 64, prompts_first: bool = True) -> "LoadOptions":
    """What they say.

    Args:
        options: with those of ``add_model_options``, ``overrides`` and, where there is such an option, ``replicas``.
        sequences: answered at a time.
        prompts_first: see ``Limits``.
    """
    from tools.generation.loaded import LoadOptions

    return LoadOptions(
        iteration=options.iteration,
        words=options.overrides,
        config=options.config,
        tokenizer=options.tokenizer,
        dtype=options.dtype,
        longest=options.context,
        sequences=sequences,
        replicas=getattr(options, "replicas", 1),
        prompts_first=prompts_first,
    )
