"""How a model's own files say that its answers are sampled."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_qwen.config.source import resolve
from megatron_qwen.errors import ConfigError, Problem, UserError
from megatron_qwen.inference.request import Sampling
from megatron_qwen.recipes.registry import RECIPES

_NAMES = {"temperature": float, "top_k": int, "top_p": float, "repetition_penalty": float}
_FILE = "generation_config.json"


def stated_sampling(source: Path) -> dict[str, Any]:
    """Temperature, top_k, top_p and repetition_penalty of a model's answers; empty where its files name none.

    Args:
        source: a Hugging Face directory, whose generation_config.json says it; or a run or checkpoint that was trained
            to answer, where that of its export does.

    Raises:
        ConfigError: a value of the file is none that can be sampled with.
    """
    if (source / "config.json").is_file():
        return _values(_read(source / _FILE), source / _FILE)
    run = next((place / "run.yaml" for place in (source, source.parent) if (place / "run.yaml").is_file()), None)
    try:
        if run is None or resolve(str(run), [], RECIPES).objective.kind == "pretrain":
            return {}
        # Imported here: they bring torch with them, for which --help need not wait.
        from checkpoints_convert.checkpoint_source import open_checkpoint
        from checkpoints_convert.exported_ids import generation_of_tokenizer, new_generation

        opened = open_checkpoint(source)
        content = generation_of_tokenizer(opened) or new_generation(opened, {})
    except UserError:
        return {}  # whatever is wrong with it, who loads the model says
    return _values(content or {}, run.parent / _FILE)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError:
        return {}
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ConfigError(Problem(str(path), None, "is no JSON object; mend it, or remove it."))
    return content


def _values(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The values, checked; temperature 0 where the file says that nothing is sampled."""
    if content.get("do_sample") is False:
        return {"temperature": 0.0}
    if not content.get("do_sample"):
        return {}
    found, wrong = dict[str, Any](), list[Problem]()
    for name, kind in _NAMES.items():
        value = content.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or kind(value) != value:
            wrong.append(Problem(f"{path}: {name}", value, "must be a number; mend the file, or remove the line."))
        else:
            found[name] = kind(value)
    if not wrong:
        wrong = [
            Problem(f"{path}: {problem.where.removeprefix('--').replace('-', '_')}", problem.value, problem.fix)
            for problem in Sampling(**found).problems()
        ]
    if wrong:
        raise ConfigError(wrong)
    return found
