"""config.json of an export: the architecture, and what the directory says that the model came from."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoints_convert.checkpoint_source import CheckpointSource
from checkpoints_convert.exported_ids import has_other_tokenizer, ids_fit, token_ids
from megatron_qwen.config.run import Architecture
from megatron_qwen.data.tokenizers.tokenizer import SOURCE_CONFIG
from megatron_qwen.errors import ConversionError
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
        DataError: the tokenizer cannot be read.
    """
    architecture = source.config.architecture
    said = list(_source_configs(source))
    with_ids = [content for content, of_tokenizer in said if _has_our_ids(content, source, of_tokenizer=of_tokenizer)]
    ids = token_ids(source, with_ids)
    config = hf_config(architecture, eos_token_id=ids["eos_token_id"], bos_token_id=ids["bos_token_id"], dtype=dtype)
    config |= ids
    for content, _ in said:
        if (before := _if_of(content, architecture)) is not None:
            # What the source leaves to transformers' defaults, the export leaves to them too.
            defaults = {name for name in config if name not in content and before.get(name) == config[name]}
            defaults -= {name for name in _ALWAYS if config.get(name) is not None}
            config = {name: value for name, value in config.items() if name not in defaults}
            kept = {name: value for name, value in kept_keys(content).items() if name not in IDS or content in with_ids}
            return in_spelling_of({**config, **kept, **{name: config[name] for name in ids if name in config}}, content)
    return config


def _source_configs(source: CheckpointSource) -> Iterator[tuple[dict[str, Any], bool]]:
    """config.json of the directory that the tokenizer of the run came from, and of the one that the model came from;
    each with whether it is the tokenizer's.
    """
    for name in (SOURCE_CONFIG, _CONFIG) if source.tokenizer is not None else ():
        if (content := _read(Path(source.tokenizer or ""), name)) is not None:
            yield content, True
    noted = source.state.get("converted_from")
    if isinstance(noted, dict) and isinstance(noted.get(_CONFIG), dict):
        yield noted[_CONFIG], False


def _has_our_ids(content: dict[str, Any], source: CheckpointSource, *, of_tokenizer: bool) -> bool:
    """Whether the token ids of a config.json are those of the tokenizer that goes into the export."""
    if not of_tokenizer:
        return not has_other_tokenizer(source)
    # Next to a tokenizer may lie the config.json of another model, or of one with another tokenizer.
    fits = ids_fit(content, source.config.model.vocab_size)
    return fits and _if_of(content, source.config.architecture) is not None


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


# What no reader should have to guess (an id that is null says nothing), and what older versions of transformers know
# by this name alone.
_ALWAYS = ("model_type", "architectures", "torch_dtype", "rope_theta", "num_experts", *IDS)
# By training: positions with the sequence length, the others with the run's configuration.
_MAY_CHANGE = (
    "max_position_embeddings",
    "rope_theta",
    "initializer_range",
    "attention_dropout",
    "router_aux_loss_coef",
)
