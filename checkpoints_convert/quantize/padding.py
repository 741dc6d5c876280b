"""Feed-forward widths that tensor parallelism of a serving engine can divide, by adding zeros.

An engine that cuts a quantized weight over N devices needs widths that are multiples of group x N. Qwen padded the
feed-forward of its 72B models for that reason, from 29,568 to 29,696: rows of zeros in gate_proj and up_proj, columns
of zeros in down_proj. silu(0) * 0 is 0, so the model is the same.
Users met it in https://github.com/QwenLM/Qwen3/issues/578 and others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from checkpoints_convert.tensor_set import TensorSet
from megatron_qwen.checkpoint.read import TensorInfo
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.hf.mapping import hf_tensors

GROUP = 128  # of GPTQ, AWQ and w4a16, and the side of a block of fp8-block
TENSOR_PARALLEL = (2, 4, 8)
AUTO = "auto"
_UNIT = GROUP * max(TENSOR_PARALLEL)
# ModelConfig's field of a width, and the key of config.json.
_DENSE = (("ffn_hidden_size", "intermediate_size"),)
_EXPERTS = (
    ("moe_ffn_hidden_size", "moe_intermediate_size"),
    ("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size"),
)


@dataclass(frozen=True)
class Padding:
    """Widths to reach.

    Args:
        widths: by the field of ModelConfig; empty for none.
    """

    widths: Mapping[str, int]

    def model(self, model: ModelConfig) -> ModelConfig:
        """The shape with these widths."""
        changes: dict[str, Any] = dict(self.widths)
        return replace(model, **changes)

    def config(self, model: ModelConfig) -> dict[str, int]:
        """Keys of config.json that change."""
        return {key: self.widths[field] for field, key in _fields(model) if field in self.widths}

    def told(self, model: ModelConfig) -> str:
        """The widths in words: from those of ``model`` to these."""
        return ", ".join(f"{field} from {getattr(model, field):,} to {width:,}" for field, width in self.widths.items())


NO_PADDING = Padding({})


def padding_of(text: str | None, model: ModelConfig) -> Padding:
    """What ``--pad-ffn`` asks for.

    Args:
        text: ``auto``, a width, or of a model with a shared expert two with a comma: the experts', the shared one's.
        model: the architecture.

    Raises:
        ConfigError: no widths, or smaller ones than the model has.
    """
    if text is None:
        return NO_PADDING
    fields = [field for field, _ in _fields(model)]
    now = {field: int(getattr(model, field)) for field in fields}
    if text == AUTO:
        wanted = {field: -(-width // _UNIT) * _UNIT for field, width in now.items()}
    else:
        words = text.split(",")
        if not all(word.strip().isdecimal() for word in words) or len(words) > len(fields):
            fix = f"must be {AUTO} or a width" + (", or two: EXPERT,SHARED." if len(fields) > 1 else ".")
            raise ConfigError(Problem("--pad-ffn", text, fix))
        wanted = dict(zip(fields, (int(word) for word in words), strict=False))
    problems = [
        Problem("--pad-ffn", width, f"is less than model.{field} = {now[field]:,}: padding only adds.")
        for field, width in wanted.items()
        if width < now[field]
    ] + [
        Problem("--pad-ffn", width, f"is more than twice model.{field} = {now[field]:,}; is it a mistake?")
        for field, width in wanted.items()
        if text != AUTO and width > 2 * now[field]
    ]
    if problems:
        raise ConfigError(problems)
    return Padding({field: width for field, width in wanted.items() if width != now[field]})


def padding_between(model: ModelConfig, wider: ModelConfig) -> Padding:
    """What one shape was padded by, if the other is wider."""
    fields = [field for field, _ in _fields(model) if getattr(wider, field) is not None]
    return Padding({field: getattr(wider, field) for field in fields if getattr(wider, field) > getattr(model, field)})


def proposal(model: ModelConfig) -> str | None:
    """What to say where widths do not fit tensor parallelism of 2, 4 and 8; None where all do.

    Args:
        model: the architecture as it is written.
    """
    unfit = [
        (field, int(width), [size for size in TENSOR_PARALLEL if width % (GROUP * size)])
        for field, width in ((field, getattr(model, field)) for field, _ in _fields(model))
        if width % _UNIT
    ]
    if not unfit:
        return None
    told = [
        f"model.{field} = {width:,} is no multiple of {GROUP} x TP for TP {', '.join(map(str, sizes))} "
        f"({-(-width // _UNIT) * _UNIT:,} is one)"
        for field, width, sizes in unfit
    ]
    fix = f"engines may refuse to serve it with that tensor parallelism; --pad-ffn {AUTO} adds zeros"
    heads = model.num_attention_heads * model.head_dim
    stays = [size for size in TENSOR_PARALLEL if heads % (GROUP * size)]
    if stays:
        fix += f". The width of attention, {heads:,}, cannot be padded: it rules out TP {', '.join(map(str, stays))}"
    return f"{'; '.join(told)}: {fix}"


def _fields(model: ModelConfig) -> list[tuple[str, str]]:
    fields = _EXPERTS if model.is_moe else _DENSE
    return [(field, key) for field, key in fields if getattr(model, field) is not None]


class PaddedWeights:
    """A model's weights in a larger shape, with zeros below and to the right of them.

    Args:
        weights: the model's.
        model: the shape to give them.
    """

    def __init__(self, weights: TensorSet, model: ModelConfig) -> None:
        self._weights = weights
        self.tensors = {
            item.name: TensorInfo(item.shape, weights.tensors[item.name].dtype) for item in hf_tensors(model)
        }

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor."""
        shape, there = self.tensors[name].shape, self._weights.tensors[name].shape
        if shape == there:
            return self._weights.rows(name, start, stop)
        found = torch.zeros((stop - start, *shape[1:]), dtype=self.tensors[name].dtype)
        last = min(stop, there[0])
        if start < last:
            found[: last - start, : there[1]] = self._weights.rows(name, start, last)
        return found
