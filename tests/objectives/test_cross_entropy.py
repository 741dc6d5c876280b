"""The chunked, vocabulary-parallel cross-entropy and log-probabilities are the plain ones."""

from typing import Any

import pytest
import torch

from tests.tiers import cases


def chunked(
    seed: int, chunk: int, vocabulary: int, padded: int, sequence_parallel: bool, by_log_probs: bool, skip: bool
) -> dict[str, Any]:
    """Loss and gradients of this rank's shard, beside the plain loss of the whole.

    By log-probabilities the loss is not linear in them, so that each token's gradient depends on its own.
    """
    import torch.distributed as dist

    from megatron_qwen.objectives.output_head import OutputHead

    size, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    torch.manual_seed(seed)
    hidden, weight = torch.randn(12, 2, 16), torch.randn(padded, 16)
    labels, mask = torch.randint(0, vocabulary, (2, 12)), (torch.rand(2, 12) > 0.3).float()
    whole_hidden, whole_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = (whole_hidden @ whole_weight[:vocabulary].t()).permute(1, 0, 2)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    losses = losses.view(2, 12)
    expected = ((losses.square() if by_log_probs else losses) * mask).sum()
    expected.backward()
    ours_hidden = hidden.chunk(size)[rank].clone() if sequence_parallel else hidden.clone()
    ours_hidden.requires_grad_()
    ours_weight = weight.chunk(size)[rank].clone().requires_grad_()
    head = OutputHead(ours_weight, group, sequence_parallel, vocab_size=vocabulary, chunk_tokens=chunk)
    furthest = 0.0
    if by_log_probs:
        found = head.log_probs(ours_hidden, labels)
        furthest = float((found + losses).abs().max())
        loss = (found.square() * mask).sum()
    else:
        found = head.cross_entropy(ours_hidden, labels, mask, skip_weightless=skip)
        loss, kept = found.total, found.weights > 0
        expected_rows = losses.t()[mask.t() > 0]
        assert len(found.losses) == (int(mask.sum()) if skip and size > 1 else mask.numel())
        furthest = float((found.losses[kept] - expected_rows).abs().max())
    (2 * loss).backward()
    grad_hidden = whole_hidden.grad.chunk(size)[rank] if sequence_parallel else whole_hidden.grad
    return {
        "loss": float((loss - expected).abs() / expected),
        "log_prob": furthest,
        "hidden": furthest_from(ours_hidden.grad, 2 * grad_hidden),
        "weight": furthest_from(ours_weight.grad, 2 * whole_weight.grad.chunk(size)[rank]),
    }


def furthest_from(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value: gradients of squares go into the hundreds."""
    return float((ours - expected).abs().max() / expected.abs().max().clamp(min=1.0))


@pytest.mark.parametrize("chunk", cases([7], [1, 1000]))
@pytest.mark.parametrize(("vocabulary", "padded"), cases([(37, 64), (20, 64)], [(40, 40)]))
@pytest.mark.parametrize(("ranks", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, True)])
@pytest.mark.parametrize(
    ("by_log_probs", "skip"),
    [(False, False), (False, True), (True, False)],
    ids=["cross-entropy", "cross-entropy of tokens with weight", "log-probabilities"],
)
def test_equals_plain_torch(by_log_probs, skip, chunk, vocabulary, padded, ranks, sequence_parallel, pool):
    for answer in pool[ranks].run(chunked, 5, chunk, vocabulary, padded, sequence_parallel, by_log_probs, skip):
        assert answer["loss"] < 1e-6
        assert answer["log_prob"] < 1e-5
        assert answer["hidden"] < 5e-6
        assert answer["weight"] < 5e-6


def test_log_probabilities_need_no_gradient(pool):
    """As a reference model's are computed."""
    assert pool[1].run(without_gradient)[0] < 1e-5


def without_gradient() -> float:
    """The largest difference from torch's."""
    import torch.distributed as dist

    from megatron_qwen.objectives.output_head import OutputHead

    torch.manual_seed(1)
    hidden, weight, labels = torch.randn(6, 3, 8), torch.randn(10, 8, requires_grad=True), torch.randint(0, 10, (3, 6))
    with torch.no_grad():
        found = OutputHead(weight, dist.group.WORLD, False, vocab_size=10, chunk_tokens=4).log_probs(hidden, labels)
        expected = torch.log_softmax(hidden @ weight.t(), dim=-1).permute(1, 0, 2)
        expected = expected.gather(2, labels[:, :, None])[:, :, 0]
    assert not found.requires_grad
    return float((found - expected).abs().max())


@pytest.mark.parametrize(("weighted", "multiple", "rows"), [(5, 1, 5), (5, 4, 8), (0, 4, 4), (17, 8, 20), (20, 1, 20)])
def test_rows_of_weight_zero_are_left_out(weighted, multiple, rows):
    """Blocks keep their size, as kernels are compiled for it; with none to leave out nothing is copied."""
    from megatron_qwen.objectives.cross_entropy import with_weight

    hidden, targets = torch.randn(20, 3), torch.arange(20)
    weights = torch.zeros(20)
    weights[torch.randperm(20)[:weighted]] = torch.rand(weighted) + 0.1
    found = with_weight(hidden, targets, weights, multiple)
    assert [len(part) for part in found] == [rows] * 3
    assert (found[0] is hidden) == (rows == 20)
    kept = found[2] > 0
    assert torch.equal(found[1][kept], weights.nonzero().flatten())
    assert torch.equal(found[0][kept], hidden[weights > 0])
    assert torch.equal(found[2][kept], weights[weights > 0])
