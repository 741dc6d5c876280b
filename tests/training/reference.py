"""The same model in transformers, trained by torch's own optimizer: what a run should have computed.

Nothing here comes from the code under test but two things: the weights to start from, as an export names them, and
which windows of the text are in a batch. Labels, masks, losses, norms and updates are worked out anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoints_convert.tensor_set import ExportedWeights
from megatron_qwen.checkpoint.find import resolve
from megatron_qwen.checkpoint.read import CheckpointReader
from megatron_qwen.checkpoint.weights import CheckpointWeights
from megatron_qwen.config.run import RunConfig
from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.data.token_files.token_file import TokenFileWriter

VOCABULARY = 320
# No loss: what transformers' cross-entropy leaves out.
IGNORED = -100
# The tiny recipes in transformers' words, written down by hand.
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 128,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "experts_implementation": "eager",
}
KINDS = {"tiny_dense": ("qwen2", _SHAPE), "tiny_moe": ("qwen2_moe", _SHAPE | _EXPERTS)}


@dataclass(frozen=True)
class Documents:
    """A token file that is known to the last token.

    Args:
        prefix: of the file.
        tokens: all of them, in order.
        lengths: of the documents.
        carries: whether a token carries loss as a label.
    """

    prefix: Path
    tokens: np.ndarray
    lengths: list[int]
    carries: np.ndarray

    @property
    def ends(self) -> set[int]:
        """Positions of the last tokens of documents."""
        return set((np.cumsum(self.lengths) - 1).tolist())


def write_documents(folder: Path, *, masked: bool) -> Documents:
    """54 short documents of random tokens to train on, and six of 175 that validation_fraction=0.1 holds out.

    Args:
        folder: where to.
        masked: with a .mask, by which documents carry loss on very different shares of their tokens. A mean over
            micro-batches or ranks is then far from the mean over tokens.
    """
    generator = np.random.default_rng(5)
    lengths = [*generator.integers(30, 160, size=54).tolist(), *[175] * 6]
    shares = generator.choice([0.05, 0.5, 1.0], size=len(lengths))
    tokens = generator.integers(0, VOCABULARY, size=sum(lengths))
    carries = np.ones(len(tokens), dtype=np.uint8)
    if masked:
        carries = (generator.random(len(tokens)) < np.repeat(shares, lengths)).astype(np.uint8)
        (folder / "text.mask").write_bytes(carries.tobytes())
    with TokenFileWriter(folder / "text", vocab_size=VOCABULARY) as writer:
        for document in np.split(tokens, np.cumsum(lengths)[:-1]):
            writer.add(document.tolist())
    return Documents(folder / "text", tokens, lengths, carries)


@dataclass(frozen=True)
class Row:
    """One sequence: tokens [s], labels [s] with ``IGNORED`` where there is no loss, and where documents begin."""

    tokens: torch.Tensor
    labels: torch.Tensor
    starts: list[int]


def held_out(documents: Documents, *, length: int) -> list[Row]:
    """All windows of the last six documents: with 1,050 tokens 16 of 64, each followed by a token."""
    first, total = len(documents.tokens) - 6 * 175, 6 * 175
    return [
        row_at(documents, first + number * length, length=length, eod_mask_loss=False)
        for number in range((total - 1) // length)
    ]


def row_at(documents: Documents, position: int, *, length: int, eod_mask_loss: bool) -> Row:
    """The window of the text that begins at a position."""
    ends = [position + at in documents.ends for at in range(length)]
    labels = documents.tokens[position + 1 : position + 1 + length].copy()
    labels[documents.carries[position + 1 : position + 1 + length] == 0] = IGNORED
    if eod_mask_loss:
        labels[ends] = IGNORED
    tokens = documents.tokens[position : position + length]
    starts = [0, *(at + 1 for at in range(length - 1) if ends[at])]
    return Row(torch.from_numpy(tokens.copy()), torch.from_numpy(labels), starts)


def batch(config: RunConfig, documents: Documents, *, step: int) -> list[Row]:
    """The rows of a step, from 1, of a run whose batches are all of one size."""
    size, length = config.training.global_batch_size, config.data.seq_length
    reader = TrainingData(config).at(0)
    windows = np.lib.stride_tricks.sliding_window_view(documents.tokens, length)
    rows = []
    for sample in range((step - 1) * size, step * size):
        # The text is random, so a window of it is found in one place.
        (position,) = np.flatnonzero((windows == reader[sample].tokens).all(axis=1)).tolist()
        rows.append(row_at(documents, position, length=length, eod_mask_loss=config.data.eod_mask_loss))
    return rows


def exported(config: RunConfig, checkpoints: Path) -> dict[str, torch.Tensor]:
    """Weights of the newest checkpoint, or of a checkpoint, by their Hugging Face names."""
    weights = ExportedWeights(CheckpointWeights(CheckpointReader(resolve(checkpoints)[0].path), config.model))
    return {name: weights.rows(name, 0, info.shape[0]) for name, info in weights.tensors.items()}


def transformers_model(recipe: str, weights: dict[str, torch.Tensor]) -> Any:
    """transformers' model of a recipe with exported weights."""
    import transformers

    kind, shape = KINDS[recipe]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **shape))
    model.load_state_dict(fused(weights), strict=True)
    return model.float().train()


def fused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights as transformers 5 holds them in memory: the experts of a layer in two tensors."""
    fused = {name: value.clone().float() for name, value in weights.items() if ".mlp.experts." not in name}
    for layer in range(4 if len(fused) < len(weights) else 0):
        prefix = f"model.layers.{layer}.mlp.experts."

        def of(matrix: str, prefix: str = prefix) -> list[torch.Tensor]:
            return [weights[f"{prefix}{expert}.{matrix}_proj.weight"].float() for expert in range(4)]

        gate_up = [torch.cat(pair) for pair in zip(of("gate"), of("up"), strict=True)]
        fused[prefix + "gate_up_proj"], fused[prefix + "down_proj"] = torch.stack(gate_up), torch.stack(of("down"))
    return fused


def has_decay(name: str) -> bool:
    """Whether a tensor is decayed, by what optim.weight_decay promises: never norms and biases."""
    return not name.endswith(("norm.weight", ".bias"))


class Twin:
    """A model that takes the steps of a run.

    Args:
        recipe: tiny_dense or tiny_moe.
        weights: that it begins with, by their exported names.
        optim: keyword arguments of torch.optim.AdamW but lr and weight_decay.
        weight_decay: of what ``has_decay``.
        clip_grad: largest norm; None does not clip.
        aux_loss_coeff: of the load-balancing loss.
        z_loss_coeff: of the router z-loss.
    """

    def __init__(
        self,
        recipe: str,
        weights: dict[str, torch.Tensor],
        *,
        optim: dict[str, Any],
        weight_decay: float,
        clip_grad: float | None,
        aux_loss_coeff: float = 0.0,
        z_loss_coeff: float = 0.0,
    ) -> None:
        self.model, self.clip_grad = transformers_model(recipe, weights), clip_grad
        self.coefficients = (aux_loss_coeff, z_loss_coeff)
        named = dict(self.model.named_parameters())
        groups = [
            {"params": [value for name, value in named.items() if has_decay(name) is decayed], "weight_decay": decay}
            for decayed, decay in ((True, weight_decay), (False, 0.0))
        ]
        self.optimizer = torch.optim.AdamW(groups, foreach=False, fused=False, **optim)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """By name, as transformers holds them."""
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}

    def step(self, micro_batches: Sequence[list[Row]], *, rate: float, separate: bool = False) -> tuple[float, float]:
        """One step over a global batch; returns the loss and the norm of the gradient before clipping."""
        loss, norm = self.backward(micro_batches, separate=separate)
        if self.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad, foreach=False)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return loss, norm

    def backward(self, micro_batches: Sequence[list[Row]], *, separate: bool = False) -> tuple[float, float]:
        """Mean loss over the tokens of a global batch, and the norm of its gradient with the router's losses."""
        self.model.zero_grad()
        tokens = sum(int((row.labels != IGNORED).sum()) for rows in micro_batches for row in rows)
        total = 0.0
        for rows in micro_batches:
            losses, auxiliary = self._micro_batch(rows, separate)
            total += float(losses) / tokens
            (losses / tokens + auxiliary / len(micro_batches)).backward()
        gradients = [value.grad.flatten() for value in self.model.parameters() if value.grad is not None]
        return total, float(torch.cat(gradients).double().norm())

    def _micro_batch(self, rows: list[Row], separate: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the losses of its tokens, and the router's losses with their coefficients."""
        if not separate:
            return self._forward(torch.stack([row.tokens for row in rows]), torch.stack([row.labels for row in rows]))
        total = torch.zeros(())
        for row in rows:
            for start, end in zip(row.starts, [*row.starts[1:], len(row.tokens)], strict=True):
                total = total + self._forward(row.tokens[None, start:end], row.labels[None, start:end])[0]
        return total, torch.zeros(())

    def _forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        routed = any(self.coefficients)
        output = self.model(tokens, use_cache=False, **({"output_router_logits": True} if routed else {}))
        # transformers' own loss; divided by one item it is the sum.
        loss = self.model.loss_function(
            output.logits, None, vocab_size=VOCABULARY, shift_labels=labels, num_items_in_batch=1
        )
        auxiliary = torch.zeros(())
        for logits in output.router_logits if routed else ():
            auxiliary = auxiliary + self.coefficients[0] * balancing_loss(logits)
            auxiliary = auxiliary + self.coefficients[1] * torch.logsumexp(logits, dim=-1).square().mean()
        return loss, auxiliary


def balancing_loss(logits: torch.Tensor) -> torch.Tensor:
    """Load-balancing loss of a layer by transformers, which is the number of chosen experts where load is even.

    megatron-core divides by that number, so that 1 is even load.
    """
    from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

    experts, chosen = _EXPERTS["num_experts"], _EXPERTS["num_experts_per_tok"]
    return load_balancing_loss_func((logits,), experts, chosen) / chosen
