"""What LoRA should compute: by PEFT, and by the definition, each on transformers' model and with torch's AdamW."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file

from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.reading.training_data import TrainingData
from tests.training.cases import in_micro_batches
from tests.training.reference import IGNORED, Row, Twin, exported, has_decay

RATE = 0.01
OPTIM = {
    "learning_rate": RATE,
    "min_learning_rate": RATE,
    "lr_warmup_iters": 0,
    "lr_decay_style": "constant",
    "weight_decay": 0.1,
    "clip_grad": 0.5,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-4,
}
_ADAM: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-4}


def rows_of_step(config: RunConfig, step: int) -> list[Row]:
    """The rows of a step, from 1, which may be of the second epoch."""
    size, reader = config.training.global_batch_size, TrainingData(config).at(0)
    rows = []
    for number in range((step - 1) * size, step * size):
        sample = reader[number]
        labels = np.where(sample.loss_mask > 0, sample.labels, IGNORED).astype(np.int64)
        rows.append(Row(torch.from_numpy(sample.tokens.astype(np.int64)), torch.from_numpy(labels), [0]))
    return rows


class _Adapted:
    """transformers' model with adapters that train.

    Args:
        recipe: tiny_dense or tiny_moe.
        config: the run whose steps are taken.
        start: checkpoint of the base.
        adapter: PEFT's files of the adapters to begin with.
    """

    def __init__(self, recipe: str, config: RunConfig, start: Path, adapter: Path) -> None:
        self._base = exported(config, start)
        self._twin = Twin(recipe, self._base, optim=_ADAM, weight_decay=0.1, clip_grad=0.5)
        self._add(adapter)
        named = self.trained()
        groups = [
            {"params": [value for name, value in named.items() if has_decay(name) is decayed], "weight_decay": decay}
            for decayed, decay in ((True, 0.1), (False, 0.0))
        ]
        self._twin.optimizer = torch.optim.AdamW(groups, foreach=False, fused=False, lr=RATE, **_ADAM)

    def steps(self, config: RunConfig, count: int) -> list[tuple[float, float]]:
        """Loss and gradient norm of each of the first steps."""
        return [
            self._twin.step(in_micro_batches(rows_of_step(config, number)), rate=RATE) for number in range(1, count + 1)
        ]

    def adapters(self) -> dict[str, torch.Tensor]:
        """By the names in PEFT's files."""
        return {name: value.detach() for name, value in self.trained().items()}

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, by the same names."""
        raise NotImplementedError

    def _add(self, adapter: Path) -> None:
        raise NotImplementedError


class WithPeft(_Adapted):
    """By PEFT."""

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """See above."""
        named = self._twin.model.named_parameters()
        return {
            name.replace(".default", "").replace(".modules_to_save", ""): value
            for name, value in named
            if value.requires_grad
        }

    def _add(self, adapter: Path) -> None:
        self._twin.model = PeftModel.from_pretrained(self._twin.model, str(adapter), is_trainable=True).train()


class Merged(_Adapted):
    """By the definition: the forward pass of merged weights, differentiated by lora_A and lora_B.

    PEFT has no adapters of its own for a shared expert beside routed ones.
    """

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """See above."""
        return dict(self._pairs)

    def _add(self, adapter: Path) -> None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        self._pairs = {name: torch.nn.Parameter(value.clone()) for name, value in tensors.items()}
        settings = json.loads((adapter / "adapter_config.json").read_text())
        self._scale = settings["lora_alpha"] / settings["r"] ** (0.5 if settings["use_rslora"] else 1)
        self._twin.model = _Functional(self._twin.model, self._weights, self._pairs)

    def _weights(self) -> dict[str, torch.Tensor]:
        found = dict(self._base)
        for name, first in self._pairs.items():
            if name.endswith("lora_A.weight"):
                layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                last = self._pairs[name.replace("lora_A", "lora_B")]
                found[f"{layer}.weight"] = found[f"{layer}.weight"] + self._scale * last @ first
        return _fused(found)


class _Functional(torch.nn.Module):
    """A model called with weights that are computed anew each time.

    Args:
        inner: the model.
        weights: computes them.
        trained: what they depend on.
    """

    def __init__(self, inner: Any, weights: Any, trained: dict[str, torch.nn.Parameter]) -> None:
        super().__init__()
        self._inner, self._weights, self._trained, self.loss_function = [inner], weights, trained, inner.loss_function

    def forward(self, *arguments: Any, **more: Any) -> Any:
        """See the model."""
        return torch.func.functional_call(self._inner[0], self._weights(), arguments, more)

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """What is trained."""
        return iter(self._trained.values())


def _fused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``reference.fused`` without leaving the graph."""
    found = {name: value for name, value in weights.items() if ".mlp.experts." not in name}
    for layer in range(4 if len(found) < len(weights) else 0):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            [weights[f"{prefix}{expert}.{part}_proj.weight"] for expert in range(4)] for part in ("gate", "up", "down")
        )
        found[prefix + "gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        found[prefix + "down_proj"] = torch.stack(down)
    return found
