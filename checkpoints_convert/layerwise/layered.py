"""A model that is run one layer at a time, so that any size fits: what comparisons of logits need of it."""

from typing import Protocol

import torch

from checkpoints_convert.tensor_set import TensorSet

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


class LayeredModel(Protocol):
    """A model of which one layer is in memory."""

    @property
    def num_layers(self) -> int:
        """Its layers."""

    @property
    def vocab_size(self) -> int:
        """Rows of its output matrix."""

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[s] -> [s, h]."""

    def load_layer(self, index: int) -> None:
        """Brings a layer into memory, in place of the one before."""

    def layer(self, hidden: torch.Tensor) -> torch.Tensor:
        """[s, h] -> [s, h] by the loaded layer."""

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """[s, h] -> [s, h]."""

    def output_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the output matrix, [stop - start, h]."""


class Ends:
    """What stands before the first and behind the last layer, read as it is needed.

    Args:
        weights: the model.
        dtype: format to compute in.
        place: device to compute on.
    """

    def __init__(self, weights: TensorSet, *, dtype: torch.dtype, place: torch.device) -> None:
        self._weights, self._dtype, self._place = weights, dtype, place
        self._head = HEAD if HEAD in weights.tensors else EMBEDDING

    @property
    def vocab_size(self) -> int:
        """Rows of the output matrix."""
        return self._weights.tensors[self._head].shape[0]

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[s] -> [s, h], reading one row for each token that occurs."""
        ids, places = tokens.unique(return_inverse=True)
        rows = [self._weights.rows(EMBEDDING, token, token + 1) for token in ids.tolist()]
        return torch.cat(rows).to(self._place, self._dtype)[places.to(self._place)]

    def norm_weight(self) -> torch.Tensor:
        """[h]."""
        size = self._weights.tensors[FINAL_NORM].shape[0]
        return self._weights.rows(FINAL_NORM, 0, size).to(self._place, self._dtype)

    def output_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the output matrix, [stop - start, h]."""
        return self._weights.rows(self._head, start, stop).to(self._place, self._dtype)
