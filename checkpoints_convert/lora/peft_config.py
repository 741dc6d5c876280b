"""adapter_config.json of PEFT: what a run's adapters are called there, and which of theirs a run can have."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_qwen.config.lora import EMBEDDING, HEAD, LoraConfig, LoraTarget, matches, possible_targets, targets
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.errors import ConversionError, Problem

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Fields of PEFT 0.21 whose value changes nothing of what is computed, or that are read here.
_READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "modules_to_save", "target_modules")
_OF_NO_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type",
)  # fmt: skip
# Initial values that leave the base model's weights as they are.
_PLAIN_INITIALISATION = (True, False, "gaussian", "orthogonal", "eva")


def peft_config(lora: LoraConfig, model: ModelConfig, *, base_name: str | None) -> dict[str, Any]:
    """The file's content.

    Args:
        lora: the adapters.
        model: what they are for.
        base_name: of the base model, as transformers loads it.
    """
    chosen = targets(lora, model)
    # PEFT fuses the gates and ups of experts (transformers 5) and doubles rank and alpha: under rsLoRA that is another
    # scale, and it refuses dropout there.
    experts = any(target.per_expert for target in chosen)
    alpha = lora.scale * (lora.rank or 0) if experts else lora.alpha
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0 if experts else lora.dropout,
        "use_rslora": lora.use_rslora and not experts,
        "target_modules": _target_modules(chosen, model),
        "modules_to_save": list(lora.modules_to_save) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    if model.share_embeddings_and_output_weights and EMBEDDING in lora.modules_to_save:
        content["ensure_weight_tying"] = True
    return content


def _target_modules(chosen: tuple[LoraTarget, ...], model: ModelConfig) -> list[str] | str:
    """Last names where they say it; else a regular expression over whole names."""
    last = sorted({target.name.rsplit(".", 1)[-1] for target in chosen})
    meant = [one for one in possible_targets(model) if any(matches(one, name) for name in last)]
    if meant == list(chosen):
        return last
    names = (re.escape(target.name).replace(r"experts\.", r"experts\.\d+\.") for target in chosen)
    return rf"(?:.*\.)?({'|'.join(names)})"


def lora_of(content: Mapping[str, Any], names: tuple[str, ...], path: Path, model: ModelConfig) -> LoraConfig:
    """The adapters that a file describes.

    Args:
        content: of the file.
        names: layers of which the weights file has adapters.
        path: the file, for messages.
        model: what they are for.

    Raises:
        ConversionError: it asks for what a run cannot have; with everything of that kind.
    """
    wrong = [Problem(f"{path}: {key}", content[key], fix) for key, fix in _unsupported(content)]
    rank, alpha = content.get("r"), content.get("lora_alpha", 8)
    if not isinstance(rank, int) or rank < 1:
        wrong.append(Problem(f"{path}: r", rank, "must be a whole number of at least 1."))
    if not isinstance(alpha, int | float) or not alpha > 0:
        wrong.append(Problem(f"{path}: lora_alpha", alpha, "must be a number above 0."))
    if wrong:
        raise ConversionError(wrong)
    saved = tuple(content.get("modules_to_save") or ())
    tied = model.share_embeddings_and_output_weights
    if unknown := [name for name in saved if name not in ((EMBEDDING,) if tied else (EMBEDDING, HEAD))]:
        known = EMBEDDING if tied else f"{EMBEDDING} and {HEAD}"
        fix = f"can be {known} here{' (embeddings are tied)' if tied else ''}; merge it with PEFT instead."
        raise ConversionError(Problem(f"{path}: modules_to_save", ", ".join(map(str, unknown)), fix))
    return LoraConfig(
        rank=rank,
        alpha=float(alpha),
        use_rslora=bool(content.get("use_rslora", False)),
        dropout=float(content.get("lora_dropout") or 0.0),
        target_modules=names,
        modules_to_save=saved,
    )


def _unsupported(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    if content.get("peft_type") != "LORA":
        found.append(("peft_type", "is no LoRA; only LORA is supported."))
    for key, value in content.items():
        if key == "init_lora_weights":
            if value not in _PLAIN_INITIALISATION:
                fix = "changes the base model's weights; convert such an adapter with PEFT first (save_pretrained with "
                found.append((key, fix + "path_initial_model_for_weight_conversion)."))
        elif key == "bias":
            if value != "none":
                found.append((key, "trains biases; supported is none."))
        elif key not in (*_READ, *_OF_NO_EFFECT) and value not in (None, False, 0, {}, []):
            found.append((key, "is not supported: it changes what the adapter computes. Merge it with PEFT instead."))
    return found
