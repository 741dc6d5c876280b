"""``mq convert to-peft``: a run's adapters as PEFT's files, which others load beside the base model."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from checkpoints_convert.checkpoint_source import CheckpointSource
from checkpoints_convert.lora.peft_config import CONFIG, WEIGHTS, peft_config
from checkpoints_convert.origin import checkpoint_origin, data_origin, published_configuration
from checkpoints_convert.release import sha256
from checkpoints_convert.work import require_free
from megatron_qwen.checkpoint.paths import LORA_BASE
from megatron_qwen.config.lora import targets
from megatron_qwen.data.tokenizers.tokenizer import copy_tokenizer
from megatron_qwen.files import publish, sync_tree, temporary_name
from megatron_qwen.hf.adapters import adapter_mappings, turned_in_peft
from megatron_qwen.hf.mapping import core_tensors
from megatron_qwen.provenance import code_version

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"


def to_peft(source: CheckpointSource, out: Path, *, base_name: str | None, local_paths: bool = False) -> int:
    """Writes the directory, which appears only when it is complete.

    Args:
        source: a checkpoint of adapters, opened without the weights that they are for.
        out: the directory to make.
        base_name: of the base model, as transformers loads it.
        local_paths: name data and checkpoint by their paths on this machine in manifest.json.

    Returns:
        Bytes of the weights.

    Raises:
        ConversionError: ``out`` is occupied.
    """
    require_free(out)
    if any(".shared_expert." in target.name for target in targets(source.config.lora, source.config.model)):
        log.warning(
            "PEFT with transformers 5 does not load adapters of a shared expert, and says so in a warning alone: merge "
            "them instead (mq convert merge, to-hf)"
        )
    lora, model = source.config.lora, source.config.model
    tensors = {
        item.names[0]: _as_in_peft(item.names[0], source.weights.rows(item, 0, item.mapping.num_rows))
        for item in core_tensors(model, adapter_mappings(lora, model))
    }
    draft = temporary_name(out.absolute())
    draft.mkdir(parents=True)
    try:
        save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
        content = peft_config(lora, model, base_name=base_name)
        (draft / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        if source.tokenizer is not None:
            copy_tokenizer(source.tokenizer, draft)
        (draft / MANIFEST).write_text(json.dumps(_manifest(source, draft, local_paths=local_paths), indent=2) + "\n")
        sync_tree(draft)
        publish(draft, out.absolute(), durable=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _as_in_peft(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.t() if turned_in_peft(name) else tensor).contiguous()


def _manifest(source: CheckpointSource, draft: Path, *, local_paths: bool) -> dict[str, Any]:
    base = source.state[LORA_BASE]
    named = {"xxh3_128": base["digest"]} | ({"path": base["path"]} if local_paths else {})
    return {
        "format": 1,
        "files": {path.name: sha256(path) for path in sorted(draft.iterdir())},
        "source": checkpoint_origin(source, local_paths=local_paths),
        "base": named,
        "data": data_origin(source, local_paths=local_paths),
        "configuration": published_configuration(source.config, local_paths=local_paths),
        "torch": torch.__version__,
        "code": code_version(),
    }
