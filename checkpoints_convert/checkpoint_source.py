"""A checkpoint to convert from: which one, what is known of it, and whether it can be trusted."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from checkpoints_convert.unexpected_file import what_it_is
from megatron_qwen.checkpoint import find, manifest
from megatron_qwen.checkpoint.common_state import read_common_state
from megatron_qwen.checkpoint.lora_base import locate, noted
from megatron_qwen.checkpoint.manifest import FileEntry
from megatron_qwen.checkpoint.merged import MergedWeights
from megatron_qwen.checkpoint.paths import MANIFEST, RUN_YAML, STATE, TOKENIZER
from megatron_qwen.checkpoint.read import CheckpointReader
from megatron_qwen.checkpoint.weights import CheckpointWeights, ModelWeights
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.source import resolve
from megatron_qwen.data.tokenizers.tokenizer import TOKENIZER_FILES
from megatron_qwen.errors import CheckpointError, ConfigError, ConversionError, DataError, Problem
from megatron_qwen.hf.adapters import adapter_mappings
from megatron_qwen.recipes.registry import RECIPES

log = logging.getLogger(__name__)

# Megatron-LM's arguments that say the same as a field of the model section.
_ARGUMENTS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "head_dim",
    "norm_epsilon": "layernorm_epsilon",
    "add_qkv_bias": "add_qkv_bias",
    "qk_layernorm": "qk_layernorm",
    "num_experts": "num_moe_experts",
}
_EXPERT_ARGUMENTS = {
    "moe_router_topk": "moe_router_topk",
    "moe_ffn_hidden_size": "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "moe_router_pre_softmax": "moe_router_pre_softmax",
}
# What a model of the family never has; another value computes another function from the same weights.
_FIXED_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "position_embedding_type": ("rope",),
    "apply_layernorm_1p": (False,),
    "rotary_percent": (1.0, 1),
    "rotary_interleaved": (False,),
    "use_rope_scaling": (False,),
    "add_bias_linear": (False,),
}


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint and what is known of it.

    Args:
        path: one iteration's directory.
        iteration: its number.
        config: the run it belongs to.
        weights: its weights; of adapters, merged with those that they are for, if it was opened so.
        entries: what its manifest notes; None for one that another program wrote.
        state: its counters and layout; empty where nothing is noted.
        common: what Megatron-LM noted, of a checkpoint that it wrote.
        tokenizer: directory of the tokenizer the run had; None where it had none.
    """

    path: Path
    iteration: int
    config: RunConfig
    weights: ModelWeights
    entries: dict[str, FileEntry] | None
    state: dict[str, Any]
    common: dict[str, Any]
    tokenizer: Path | None

    @property
    def run_dir(self) -> Path | None:
        """The run directory of this checkpoint; None outside a run directory."""
        candidate = self.path.absolute().parent.parent
        return candidate if self.path.absolute().parent.name == "checkpoints" and candidate.is_dir() else None

    def digest(self) -> str:
        """A hash that differs between checkpoints, without reading the weights."""
        if self.entries is not None:
            return manifest.hash_file(self.path / MANIFEST).xxh3_128
        # Without a manifest, only sizes and times of the shards show that they have changed.
        found = xxhash.xxh3_128()
        for name in manifest.files_in(self.path):
            status = (self.path / name).stat()
            found.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
        found.update(manifest.hash_file(self.path / ".metadata").xxh3_128.encode())
        return found.hexdigest()

    def unread_parts(self) -> list[tuple[str, int, int, str]]:
        """Parts of the manifest that hold no weight: (file, first byte, bytes, hash)."""
        touched = {(chunk.file, chunk.start) for chunk in self.weights.chunks()}
        return [
            (name, start, length, digest)
            for name, entry in (self.entries or {}).items()
            for start, length, digest in entry.spans()
            if (name, start) not in touched
        ]


def choose(path: Path, iteration: int | None) -> find.CheckpointCandidate:
    """The checkpoint that is meant: the newest, or the one of an iteration. Never another in its place.

    Raises:
        CheckpointError: there is none.
    """
    candidates = find.resolve(path)
    if iteration is None:
        return candidates[0]
    for candidate in candidates:
        if candidate.iteration == iteration:
            return candidate
    there = ", ".join(str(candidate.iteration) for candidate in candidates[:10])
    raise CheckpointError(Problem("--iteration", iteration, f"{path} has no such checkpoint; it has {there}."))


def open_checkpoint(
    path: Path,
    *,
    iteration: int | None = None,
    config: str | None = None,
    overrides: Sequence[str] = (),
    where_needed: bool = False,
    tokenizer: Path | None = None,
    base: Path | None = None,
    merged: bool = True,
) -> CheckpointSource:
    """Opens a checkpoint for reading; everything but the weights is checked at once, the weights when they are read.

    Args:
        path: a run directory, a checkpoint root or one iteration.
        iteration: which checkpoint; None is the newest.
        config: recipe or run.yaml that names the architecture, where the checkpoint has none itself.
        overrides: ``section.field=value`` words that go with it.
        where_needed: leave ``config`` out of account where the checkpoint has a run.yaml, instead of refusing it.
        tokenizer: tokenizer directory, instead of the run's.
        base: where the weights that its adapters are for may be, if they were moved.
        merged: open adapters with the weights that they are for; False opens adapters alone.

    Raises:
        CheckpointError: it is damaged, or does not fit its configuration; names everything that is wrong.
        ConfigError: its architecture is not known.
    """
    chosen = choose(path, iteration)
    entries = _trusted_entries(chosen.path)
    run_yaml = chosen.path / RUN_YAML
    if config is None and not run_yaml.is_file():
        fix = f"{chosen.path} does not describe its architecture; name a recipe (mq recipes) or a run.yaml."
        raise ConfigError(Problem("--config", None, fix))
    if run_yaml.is_file():
        if (config is not None or overrides) and not where_needed:
            fix = f"{chosen.path} has its own run.yaml, which describes it; omit this option."
            raise ConfigError(Problem("--config", config or " ".join(overrides), fix))
        config, overrides = str(run_yaml), ()
    assert config is not None
    resolved = resolve(config, overrides, RECIPES)
    common = {} if entries is not None else read_common_state(chosen.path)
    if problems := _contradictions(common, resolved, chosen.path):
        raise CheckpointError(problems)
    state = read_state(chosen.path)
    weights = _weights(chosen.path, entries, resolved, state, base, merged=merged)
    return CheckpointSource(
        chosen.path,
        chosen.iteration,
        resolved,
        weights,
        entries,
        state,
        common,
        _tokenizer(chosen.path, resolved, tokenizer),
    )


def _weights(
    path: Path,
    entries: dict[str, FileEntry] | None,
    config: RunConfig,
    state: dict[str, Any],
    base: Path | None,
    *,
    merged: bool,
) -> ModelWeights:
    reader, found = CheckpointReader(path, entries), noted(state)
    if found is None:
        if base is not None:
            raise ConfigError(Problem("--base", base, f"is for adapters; {path} has whole weights. Omit it."))
        if not merged:
            fix = "has no adapters: its run trained all weights. Export it with mq convert to-hf."
            raise ConversionError(Problem(str(path), None, fix))
        return CheckpointWeights(reader, config.model)
    adapters = CheckpointWeights(reader, config.model, adapter_mappings(config.lora, config.model))
    if not merged:
        return adapters
    place = locate(found, also=base, wanted_by=str(path))
    log.info("%s: its adapters are merged into the weights of %s", path, place)
    frozen = CheckpointWeights(CheckpointReader(place, _trusted_entries(place)), config.model)
    return MergedWeights(frozen, adapters, config.lora)


def _trusted_entries(directory: Path) -> dict[str, FileEntry] | None:
    """The manifest, after every file was checked whose parts are not hashed one by one."""
    if not (directory / MANIFEST).is_file() and not (directory / RUN_YAML).is_file():
        return None
    entries = manifest.read(directory)
    if isinstance(entries, Problem):
        raise CheckpointError(entries)
    damage = manifest.unknown_files(directory, entries)
    whole = [name for name, entry in entries.items() if not entry.parts]
    damage += manifest.damage(directory, whole)
    for name, entry in entries.items():
        path = directory / name
        if entry.parts and (not path.is_file() or path.stat().st_size != entry.size):
            damage += manifest.damage(directory, [name])
    if damage:
        raise damaged(directory)
    return entries


def damaged(directory: Path, error: CheckpointError | None = None) -> CheckpointError:
    """The error of a checkpoint that is not as it was written: every file is read, so that all damage is named.

    Args:
        directory: one iteration's directory.
        error: what was met first; it stands where every file is as the manifest says, or there is none.
    """
    found = manifest.damage(directory) if (directory / MANIFEST).is_file() else []
    if not found and error is not None:
        return error
    others = [candidate for candidate in _others(directory) if candidate.path != directory]
    if others:
        found.append(
            Problem("--iteration", None, f"there is also iteration {others[0].iteration}; choose it with --iteration.")
        )
    return CheckpointError(found)


def _others(directory: Path) -> list[find.CheckpointCandidate]:
    try:
        return find.resolve(directory.parent)
    except CheckpointError:
        return []


def read_state(directory: Path) -> dict[str, Any]:
    """state.json of a checkpoint, or nothing where there is none that can be read."""
    try:
        content = json.loads((directory / STATE).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _contradictions(common: dict[str, Any], config: RunConfig, directory: Path) -> list[Problem]:
    """Where Megatron-LM's own arguments say something else than the configuration."""
    arguments = vars(common["args"]) if hasattr(common.get("args"), "__dict__") else {}
    model = config.model
    names = _ARGUMENTS | (_EXPERT_ARGUMENTS if model.is_moe else {"ffn_hidden_size": "ffn_hidden_size"})
    fields = {theirs: (f"model.{_field(ours)}", getattr(model, ours)) for theirs, ours in names.items()}
    fields["rotary_base"] = ("rope.base", config.rope.base)
    found = []
    for theirs, (path, asked) in fields.items():
        noted = arguments.get(theirs)
        if noted is not None and noted != asked:
            fix = f"the checkpoint was written with {theirs} = {noted}; override it ({path}=...)."
            found.append(Problem(path, asked, fix))
    if arguments.get("group_query_attention") and arguments.get("num_query_groups") != model.num_query_groups:
        fix = f"the checkpoint was written with num_query_groups = {arguments.get('num_query_groups')}."
        found.append(Problem("model.num_query_groups", model.num_query_groups, fix))
    tied = arguments.get("untie_embeddings_and_output_weights")
    if tied is not None and bool(tied) is model.share_embeddings_and_output_weights:
        fix = f"the checkpoint was written with untie_embeddings_and_output_weights = {tied}."
        found.append(
            Problem("model.share_embeddings_and_output_weights", model.share_embeddings_and_output_weights, fix)
        )
    found += [
        Problem(str(directory), f"{name}={arguments[name]}", "no supported model has that; it cannot be converted.")
        for name, allowed in _FIXED_ARGUMENTS.items()
        if arguments.get(name) is not None and arguments[name] not in allowed
    ]
    return found


def _field(attribute: str) -> str:
    return "kv_channels" if attribute == "head_dim" else attribute


def _tokenizer(directory: Path, config: RunConfig, asked: Path | None) -> Path | None:
    """The tokenizer's directory: the one asked for, the checkpoint's own copy, or where run.yaml says it lies."""
    if asked is not None:
        if not asked.is_dir():
            raise DataError(Problem("--tokenizer", asked, "is not a directory."))
        told = [(asked / name, what_it_is(asked / name)) for name in TOKENIZER_FILES]
        if problems := [Problem(str(path), None, what) for path, what in told if what is not None]:
            raise DataError(problems)
        return asked
    if (directory / TOKENIZER).is_dir():
        return directory / TOKENIZER
    if config.data.tokenizer is None:
        return None
    if not Path(config.data.tokenizer).is_dir():
        fix = "no longer exists, and the checkpoint has no copy; name a tokenizer with --tokenizer."
        raise ConversionError(Problem("data.tokenizer", config.data.tokenizer, fix))
    return Path(config.data.tokenizer)
