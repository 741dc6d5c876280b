"""On a GPU: the kernels of the loss give torch's cross-entropy and its gradient."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]


@pytest.fixture
def alone() -> Iterator[object]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [64, 1000])
@pytest.mark.parametrize(("vocabulary", "padded"), [(151_936, 151_936), (30_000, 30_080)])
@pytest.mark.parametrize("by_log_probs", [False, True])
def test_equals_plain_cross_entropy(by_log_probs, dtype, chunk, vocabulary, padded, alone):
    from megatron_qwen.objectives.output_head import OutputHead

    torch.manual_seed(0)
    hidden = torch.randn(200, 1, 128, device="cuda", dtype=dtype)
    weight = (torch.randn(padded, 128, device="cuda") * 0.1).to(dtype)
    labels = torch.randint(0, vocabulary, (1, 200), device="cuda")
    mask = (torch.rand(1, 200, device="cuda") > 0.3).float()
    exact_hidden, exact_weight = (tensor.double().requires_grad_() for tensor in (hidden, weight))
    logits = (exact_hidden @ exact_weight[:vocabulary].t()).flatten(0, 1)
    expected = (torch.nn.functional.cross_entropy(logits, labels[0], reduction="none") * mask[0]).sum()
    expected.backward()
    hidden.requires_grad_()
    weight.requires_grad_()
    head = OutputHead(weight, alone, sequence_parallel=False, vocab_size=vocabulary, chunk_tokens=chunk)
    loss = (
        -(head.log_probs(hidden, labels) * mask).sum()
        if by_log_probs
        else head.cross_entropy(hidden, labels, mask).total
    )
    loss.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert float(loss) == pytest.approx(float(expected), rel=tolerance / 10)
    for ours, exact in ((hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad)):
        assert float((ours.double() - exact).norm() / exact.norm()) < tolerance
