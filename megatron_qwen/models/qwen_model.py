"""megatron-core's GPT model, for rows with padding under every layout."""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

# Of what GPTModel._preprocess returns (megatron-core 0.19).
_PADDING_MASK = 5


class QwenModel(GPTModel):
    """A model chunk whose routers know which positions are padding.

    megatron-core cuts the mask for sequence parallelism on the first pipeline stage only, and over a process group that
    it takes from global state. Here each stage cuts it, over the groups of the model.
    """

    def _preprocess(self, *arguments: Any, padding_mask: torch.Tensor | None = None, **more: Any) -> tuple[Any, ...]:
        """See GPTModel.

        Args:
            arguments: of GPTModel.
            padding_mask: bool, [b, s / CP], true at padding; the same on all ranks of a TP group.
            more: of GPTModel.
        """
        found: tuple[Any, ...] = super()._preprocess(*arguments, padding_mask=None, **more)
        if padding_mask is not None and self.config.sequence_parallel:
            group = self.pg_collection.tp
            padding_mask = padding_mask.chunk(group.size(), dim=1)[group.rank()]
        return (*found[:_PADDING_MASK], padding_mask, *found[_PADDING_MASK + 1 :])
