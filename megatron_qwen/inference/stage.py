"""This rank's part of the model in inference: the modules that train, over a cache of keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_qwen.config.run import RunConfig
from megatron_qwen.distributed.groups import is_first_stage, is_last_stage
from megatron_qwen.inference.kv_cache import CachedAttention, CacheShape, KvCache
from megatron_qwen.inference.scheduler import Span
from megatron_qwen.models.core_config import DTYPES
from megatron_qwen.models.sequences import CachedSequences
from megatron_qwen.models.torch_backend.dense_gemm import INVARIANT_ROWS
from megatron_qwen.objectives.output_head import OutputHead

_CHUNK = 1024  # tokens whose logits are held at a time, of a text that is scored whole


@dataclass(frozen=True)
class StepTokens:
    """The tokens of a step, and what fills them up.

    Args:
        spans: what is computed.
        ids: token ids, [n].
        positions: of each in its sequence, [n].
    """

    spans: Sequence[Span]
    ids: torch.Tensor
    positions: torch.Tensor

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
    """

    def __init__(self, module: Any, config: RunConfig, groups: ProcessGroupCollection, *, longest: int) -> None:
        self.module, self.config, self.groups, self.longest = module, config, groups, longest
        self.is_first, self.is_last = is_first_stage(groups), is_last_stage(groups)
        layers = module.decoder.layers
        self._first_layer = layers[0].layer_number
        attention = layers[0].self_attention
        self.shape = CacheShape(
            layers=len(layers),
            heads=attention.num_query_groups_per_partition,
            head_dim=attention.hidden_size_per_attention_head,
            dtype=DTYPES[config.precision.dtype],
        )
        self.device = next(module.parameters()).device
        self._angles = module.rotary_pos_emb(longest)
        tp = config.parallel.tensor_model_parallel_size
        self._split = tp if config.parallel.sequence_parallel else 1

    def tokens(self, spans: Sequence[Span]) -> StepTokens:
        """The tokens of some spans, filled up to what all layers can compute with."""
        ids = [token for span in spans for token in span.sequence.tokens[span.start : span.stop]]
        positions = [position for span in spans for position in range(span.start, span.stop)]
        count = max(INVARIANT_ROWS, len(ids))
        more = count + -count % self._split - len(ids)
        return StepTokens(
            spans,
            torch.tensor(ids + [0] * more, dtype=torch.int64, device=self.device),
            torch.tensor(positions + [0] * more, dtype=torch.int64, device=self.device),
        )

    def hidden_shape(self, tokens: int) -> tuple[int, int, int]:
        """What a stage gives to the next: [n, 1, h], of this rank's tokens under sequence parallelism."""
        return (tokens // self._split, 1, self.config.model.hidden_size)

    @torch.no_grad()
    def __call__(self, tokens: StepTokens, cache: KvCache, hidden: torch.Tensor | None) -> torch.Tensor:
        """Computes a step.

        Args:
            tokens: of the step.
            cache: that holds the blocks of its sequences; their keys and values are written.
            hidden: what the stage before it gave, ``hidden_shape``; None on the first.

        Returns:
            Hidden states, ``hidden_shape``; of the last stage behind the final norm.
        """
        cached = CachedAttention(cache, tokens.spans)
        first = self._first_layer

        def attend(
            number: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
        ) -> torch.Tensor:
            return cached(number - first, query, key, value, scale)

        if self.is_first:
            assert hidden is None
            hidden = self.module.embedding(input_ids=tokens.ids[None], position_ids=tokens.positions[None])
        else:
            assert hidden is not None
            self.module.decoder.set_input_tensor(hidden)
        sequences = CachedSequences(qkv_format="thd", positions=tokens.positions, attend=attend)
        found: torch.Tensor = self.module.decoder(
            hidden_states=hidden if self.is_first else None,
            attention_mask=None,
            rotary_pos_emb=self._angles,
            packed_seq_params=sequences,
        )
        return found

    def head(self) -> OutputHead:
        """The output layer, on the last stage."""
        module = self.module
        tied = module.share_embeddings_and_output_weights
        return OutputHead(
            module.shared_embedding_or_output_weight() if tied else module.output_layer.weight,
            group=self.groups.tp,
            sequence_parallel=self.config.parallel.sequence_parallel,
            vocab_size=self.config.model.vocab_size,
            chunk_tokens=_CHUNK,
        )
