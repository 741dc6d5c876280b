"""This rank's part of the model in inference: the modules that train, over a cache of keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_qwen.config.run import RunConfig
from megatron_qwen.distributed.groups import is_first_stage, is_last_stage
from megatron_qwen.inference.attention import CachedAttention
from megatron_qwen.inference.gathered import GatheredSets
from megatron_qwen.inference.kv_cache import CacheShape, KvCache
from megatron_qwen.inference.layers import Layers
from megatron_qwen.inference.scheduler import Span
from megatron_qwen.inference.weight_product import Products
from megatron_qwen.models.core_config import DTYPES
from megatron_qwen.models.torch_backend.invariant_gemm import INVARIANT_ROWS
from megatron_qwen.objectives.output_head import OutputHead

_CHUNK = 1024  # tokens whose logits are held at a time, of a text that is scored whole


@dataclass(frozen=True)
class StepTokens:
    """The tokens of a step, and what fills them up.

    Args:
        spans: what is computed.
        ids: token ids, [n].
        positions: of each in its sequence, [n].
        asked: rows whose logits are asked for, in the order of the spans; filled up with rows that are not. None where
            these are all rows.
    """

    spans: Sequence[Span]
    ids: torch.Tensor
    positions: torch.Tensor
    asked: torch.Tensor | None

    @property
    def count(self) -> int:
        """Tokens with those that fill it up."""
        return len(self.ids)


class Stage:
    """A pipeline stage.

    Args:
        module: the model chunk of this rank, in evaluation mode.
        config: of the run.
        groups: of this rank.
        longest: positions that a sequence can have.
        copy_bytes: that copies of weights may take, which make steps of few tokens faster.

    Attributes:
        products: of this stage's weights.
    """

    def __init__(
        self, module: Any, config: RunConfig, groups: ProcessGroupCollection, *, longest: int, copy_bytes: int = 2**30
    ) -> None:
        self.module, self.config, self.groups, self.longest = module, config, groups, longest
        self.is_first, self.is_last = is_first_stage(groups), is_last_stage(groups)
        attention = module.decoder.layers[0].self_attention
        self.shape = CacheShape(
            layers=len(module.decoder.layers),
            heads=attention.num_query_groups_per_partition,
            head_dim=attention.hidden_size_per_attention_head,
            dtype=DTYPES[config.precision.dtype],
        )
        self.device = next(module.parameters()).device
        half = module.rotary_pos_emb(longest)[:, 0, 0, : self.shape.head_dim // 2]
        self._cos, self._sin = half.cos().to(self.shape.dtype), half.sin().to(self.shape.dtype)
        tp = config.parallel.tensor_model_parallel_size
        self._split = tp if config.parallel.sequence_parallel else 1
        product = Products(copy_bytes)
        self._logits = product(self._output_weight().detach(), None) if self.is_last else None
        sequence_parallel = config.parallel.sequence_parallel
        self.products = product
        self._layers = Layers(module.decoder, groups, sequence_parallel=sequence_parallel, product=product)

    def tokens(self, spans: Sequence[Span]) -> StepTokens:
        """The tokens of some spans, filled up to what all layers can compute with."""
        ids = [token for span in spans for token in span.sequence.tokens[span.start : span.stop]]
        positions = [position for span in spans for position in range(span.start, span.stop)]
        count = max(INVARIANT_ROWS, len(ids))
        more = count + -count % self._split - len(ids)
        asked, first = [], 0
        for span in spans:
            asked += [first + position - span.start for position in span.asked]
            first += span.stop - span.start
        asked += [0] * (INVARIANT_ROWS - len(asked))
        return StepTokens(
            spans,
            torch.tensor(ids + [0] * more, dtype=torch.int64, device=self.device),
            torch.tensor(positions + [0] * more, dtype=torch.int64, device=self.device),
            None if asked == list(range(count)) else torch.tensor(asked, dtype=torch.int64, device=self.device),
        )

    def hidden_shape(self, tokens: int) -> tuple[int, int, int]:
        """What a stage gives to the next: [n, 1, h], of this rank's tokens under sequence parallelism."""
        return (tokens // self._split, 1, self.config.model.hidden_size)

    @torch.inference_mode()
    def __call__(
        self, tokens: StepTokens, cache: KvCache, sets: GatheredSets, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        """Computes a step.

        Args:
            tokens: of the step.
            cache: that holds the blocks of its sequences; their keys and values are written.
            sets: of the cache.
            hidden: what the stage before it gave, ``hidden_shape``; None on the first.

        Returns:
            Hidden states, ``hidden_shape``. The last stage: behind the final norm, of the rows that are asked for,
            [asked, h], on every TP rank.
        """
        if self.is_first:
            assert hidden is None
            hidden = self.module.embedding(input_ids=tokens.ids[None], position_ids=tokens.positions[None])
        assert hidden is not None
        cos, sin = self._cos[tokens.positions], self._sin[tokens.positions]
        attend = CachedAttention(cache, sets, tokens.spans, tokens.count)
        # Of the last layer nothing but keys and values is needed of the other tokens.
        early = self.is_last and self._split == 1
        found = self._layers(hidden.squeeze(1), cos, sin, attend, only=tokens.asked if early else None)
        if not self.is_last:
            return found.unsqueeze(1)
        if early:
            return found
        rows = self.head().rows(found)
        return rows if tokens.asked is None else rows[tokens.asked]

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """This rank's logits of tokens on the last stage, [n, h] -> [n, padded vocabulary / TP]; n is 4 and more."""
        assert self._logits is not None
        return self._logits(rows)

    def _output_weight(self) -> torch.Tensor:
        module = self.module
        tied = module.share_embeddings_and_output_weights
        weight: torch.Tensor = module.shared_embedding_or_output_weight() if tied else module.output_layer.weight
        return weight

    def head(self) -> OutputHead:
        """The output layer, on the last stage."""
        return OutputHead(
            self._output_weight(),
            group=self.groups.tp,
            sequence_parallel=self.config.parallel.sequence_parallel,
            vocab_size=self.config.model.vocab_size,
            chunk_tokens=_CHUNK,
        )
