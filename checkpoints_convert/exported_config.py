"""config.json of an export: the architecture, and what the directory says that the model came from."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from checkpoints_convert.checkpoint_source import CheckpointSource
from megatron_qwen.config.run import Architecture
from megatron_qwen.data.tokenizers.tokenizer import SOURCE_CONFIG, special_ids
from megatron_qwen.errors import ConversionError, DataError
from megatron_qwen.hf.config import architecture_from_hf, hf_config
from megatron_qwen.hf.kept import IDS, in_spelling_of, kept_keys

_CONFIG = "config.json"


def exported_config(source: CheckpointSource, *, dtype: str) -> dict[str, Any]:
    """config.json of a checkpoint.

    Args:
        source: the checkpoint.
        dtype: torch's name of the weights' format.

    Raises:
        ConversionError: no class of the family can express the architecture.
        DataError: the tokenizer names no end of text.
    """
    architecture = source.config.architecture
    said = list(_source_configs(source))
    ids = _token_ids(source, said)
    config = hf_config(architecture, eos_token_id=ids["eos_token_id"], bos_token_id=ids["bos_token_id"], dtype=dtype)
    config |= ids
    for content in said:
        if (before := _if_of(content, architecture)) is not None:
            # What the source leaves to transformers' defaults, the export leaves to them too.
            defaults = {name for name in config if name not in content and before.get(name) == config[name]}
            config = {name: value for name, value in config.items() if name not in defaults or name in _ALWAYS}
            return in_spelling_of({**config, **kept_keys(content), **ids}, content)
    return config


def _source_configs(source: CheckpointSource) -> Iterator[dict[str, Any]]:
    """config.json of the directory that the tokenizer of the run came from, and of the one that the model came from."""
    for name in (SOURCE_CONFIG, _CONFIG) if source.tokenizer is not None else ():
        if (content := _read(Path(source.tokenizer or ""), name)) is not None:
            yield content
    noted = source.state.get("converted_from")
    if isinstance(noted, dict) and isinstance(noted.get(_CONFIG), dict):
        yield noted[_CONFIG]


def _read(directory: Path, name: str) -> dict[str, Any] | None:
    try:
        content = json.loads((directory / name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _if_of(content: dict[str, Any], architecture: Architecture) -> dict[str, Any] | None:
    """What a config.json says in the terms of an export, if it describes this model; None otherwise. Training may have
    changed RoPE and the number of positions.
    """
    try:
        other = architecture_from_hf(content, where=_CONFIG)
    except ConversionError:
        return None
    ours, theirs = (hf_config(one, eos_token_id=None, bos_token_id=None, dtype="") for one in (architecture, other))
    same = ours.keys() == theirs.keys() and all(ours[name] == theirs[name] for name in ours if name not in _MAY_CHANGE)
    return theirs if same else None


# What no reader should have to guess, and what older versions of transformers know by this name alone.
_ALWAYS = ("model_type", "architectures", "torch_dtype", "rope_theta", "num_experts", *IDS)
# By training: positions with the sequence length, the others with the run's configuration.
_MAY_CHANGE = (
    "max_position_embeddings",
    "rope_theta",
    "initializer_range",
    "attention_dropout",
    "router_aux_loss_coef",
)


def _token_ids(source: CheckpointSource, said: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """eos, bos and, where the source has one, pad: as the source's config.json has them, else from the tokenizer."""
    for content in said:
        if content.get("eos_token_id") is not None:
            return {name: content.get(name) for name in IDS if name in content or name != "pad_token_id"}
    if source.tokenizer is None:
        return {"eos_token_id": None, "bos_token_id": None}
    try:
        eos, bos = special_ids(source.tokenizer)
    except DataError:
        if not said:
            raise
        return {"eos_token_id": None, "bos_token_id": None}
    return {"eos_token_id": eos, "bos_token_id": bos}
