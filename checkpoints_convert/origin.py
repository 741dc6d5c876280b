"""Where a released model comes from, in names and hashes; where that lay on this machine is told only if asked for."""

import json
from pathlib import Path, PurePath
from typing import Any

from checkpoints_convert.checkpoint_source import CheckpointSource
from megatron_qwen.config.blend import SINGLE
from megatron_qwen.config.run import RunConfig, as_dict, with_paths
from megatron_qwen.hf.kept import is_local_path


def checkpoint_origin(source: CheckpointSource, *, local_paths: bool) -> dict[str, Any]:
    """The checkpoint: its names, and the hash that tells it from every other.

    Args:
        source: the checkpoint.
        local_paths: name its directory in full, too.
    """
    path = source.path.absolute()
    return {
        "kind": "checkpoint",
        "name": path.name,
        "run": None if source.run_dir is None else source.run_dir.name,
        "iteration": source.iteration,
        "xxh3_128": source.digest(),
        "verified": source.entries is not None,
        "written_by": source.state.get("code"),
    } | ({"path": str(path)} if local_paths else {})


def data_origin(source: CheckpointSource, *, local_paths: bool) -> list[dict[str, Any]]:
    """The sources of tokens that the run has read: name, size, and the hash of all its tokens.

    The ledger in the checkpoint has them. Where there is none (another program's checkpoint) the configuration has at
    least a name.

    Args:
        source: the checkpoint.
        local_paths: name the token files in full, too.
    """
    data = source.config.data
    ledger = source.state.get("data")
    noted = ledger.get("sources") if isinstance(ledger, dict) else None
    if not isinstance(noted, dict) or not noted:
        named = data.path or data.blend
        return [] if named is None else [_named(_last(named), named, {}, local_paths=local_paths)]
    found = []
    for name, known in sorted(noted.items()):
        known = known if isinstance(known, dict) else {}
        path = known.get("path")
        path = path if isinstance(path, str) else name
        # A run without a blend has one source, whose name in the ledger says nothing.
        told = path if name == SINGLE and data.blend is None else name
        found.append(_named(_last(told), path, known, local_paths=local_paths))
    return found


def published_configuration(config: RunConfig, *, local_paths: bool) -> dict[str, Any]:
    """The configuration; of paths the last component, which is a name to a reader elsewhere.

    Args:
        config: of the run.
        local_paths: leave paths as they are.
    """
    return as_dict(config if local_paths else with_paths(config, _last))


def local_path_in(tokenizer: Path) -> str | None:
    """A path that transformers noted in a tokenizer's configuration: older versions keep where they loaded it from."""
    try:
        content = json.loads((tokenizer / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    named = content.get("name_or_path") if isinstance(content, dict) else None
    return named if isinstance(named, str) and is_local_path(named) else None


def _named(name: str, path: str, known: dict[str, Any], *, local_paths: bool) -> dict[str, Any]:
    digest = known.get("digest")
    sizes = {key: value for key in ("tokens", "documents") if isinstance(value := known.get(key), int)}
    return {"name": name, **sizes, "xxh3_128": digest if isinstance(digest, str) else None} | (
        {"path": path} if local_paths else {}
    )


def _last(path: str) -> str:
    return PurePath(path).name
