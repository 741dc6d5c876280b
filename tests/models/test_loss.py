"""The chunked, vocabulary-parallel cross-entropy is the plain one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch


def chunked(seed: int, chunk: int, vocabulary: int, padded: int, sequence_parallel: bool) -> dict[str, Any]:
    """Loss and gradients of this rank's shard, beside the plain loss of the whole."""
    import torch.distributed as dist

    from megatron_qwen.models.loss import output_loss

    size, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    torch.manual_seed(seed)
    hidden, weight = torch.randn(12, 2, 16), torch.randn(padded, 16)
    labels, mask = torch.randint(0, vocabulary, (2, 12)), (torch.rand(2, 12) > 0.3).float()
    whole_hidden, whole_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = (whole_hidden @ whole_weight[:vocabulary].t()).permute(1, 0, 2)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    expected = (losses * mask.flatten()).sum()
    expected.backward()
    ours_hidden = hidden.chunk(size)[rank].clone() if sequence_parallel else hidden.clone()
    ours_hidden.requires_grad_()
    ours_weight = weight.chunk(size)[rank].clone().requires_grad_()
    loss = output_loss(
        ours_hidden,
        ours_weight,
        labels,
        mask,
        groups=SimpleNamespace(tp=group),
        sequence_parallel=sequence_parallel,
        vocab_size=vocabulary,
        chunk_tokens=chunk,
    )
    (2 * loss).backward()
    grad_hidden = whole_hidden.grad.chunk(size)[rank] if sequence_parallel else whole_hidden.grad
    return {
        "loss": float((loss - expected).abs() / expected),
        "hidden": float((ours_hidden.grad - 2 * grad_hidden).abs().max()),
        "weight": float((ours_weight.grad - 2 * whole_weight.grad.chunk(size)[rank]).abs().max()),
    }


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize(("vocabulary", "padded"), [(40, 40), (37, 64), (20, 64)])
@pytest.mark.parametrize(("ranks", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, True)])
def test_equals_plain_cross_entropy(chunk, vocabulary, padded, ranks, sequence_parallel, pool):
    for answer in pool[ranks].run(chunked, 5, chunk, vocabulary, padded, sequence_parallel):
        assert answer["loss"] < 1e-6
        assert answer["hidden"] < 1e-4
        assert answer["weight"] < 1e-4
