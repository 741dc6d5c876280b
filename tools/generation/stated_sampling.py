"""How a model's own files say that its answers are sampled."""

import json
from pathlib import Path
from typing import Any

from megatron_qwen.config.source import resolve
from megatron_qwen.errors import UserError
from megatron_qwen.hf.sampling import SAMPLING
from megatron_qwen.recipes.registry import RECIPES

_NAMES = ("temperature", "top_k", "top_p", "repetition_penalty")


def stated_sampling(source: Path) -> dict[str, Any]:
    """Temperature, top_k, top_p and repetition_penalty of a model's answers; empty where its files name none.

    Args:
        source: a Hugging Face directory, whose generation_config.json says it; or a run or checkpoint, where training
            to answer (objective.kind) has those that its export gets.
    """
    path = source / "generation_config.json"
    try:
        if (source / "config.json").is_file():
            content = json.loads(path.read_bytes())
            return {name: content[name] for name in _NAMES if name in content} if content.get("do_sample") else {}
        run = next((place / "run.yaml" for place in (source, source.parent) if (place / "run.yaml").is_file()), None)
        answers = run is not None and resolve(str(run), [], RECIPES).objective.kind != "pretrain"
    except (OSError, ValueError, AttributeError, TypeError, UserError):
        return {}  # whatever is wrong with it, who loads the model says
    return {name: SAMPLING[name] for name in _NAMES} if answers else {}
