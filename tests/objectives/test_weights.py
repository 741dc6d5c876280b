"""Weights of tokens between 0 and 1: the mean that they make, and a whole number to divide by."""

import pytest
import torch

from megatron_qwen.config.objective import ObjectiveConfig
from megatron_qwen.data.loaders.batches import Batch
from megatron_qwen.objectives.output_head import OutputHead
from megatron_qwen.objectives.pretrain import Pretrain
from megatron_qwen.objectives.sft import Sft


class Alone:
    """A group of one rank."""

    def size(self):
        return 1

    def rank(self):
        return 0


WEIGHTS = [0.0, 1.0, 0.07, 0.25, 0.99, 0.33]


@pytest.mark.parametrize("objective", [Sft(ObjectiveConfig(kind="sft"), (), 100), Pretrain(100)])
def test_the_mean_is_weighed(objective, monkeypatch):
    monkeypatch.setattr("megatron.core.tensor_parallel.copy_to_tensor_model_parallel_region", lambda x, group: x)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(WEIGHTS), 1, 8, generator=generator).requires_grad_()
    weight = torch.randn(32, 8, generator=generator)
    labels = torch.randint(0, 32, (1, len(WEIGHTS)), generator=generator)
    mask = torch.tensor([WEIGHTS])
    batch = Batch(tokens=labels, labels=labels, loss_mask=mask, position_ids=labels)
    found = objective(hidden, OutputHead(weight, Alone(), False, 32, 64), batch).loss
    losses = torch.nn.functional.cross_entropy((hidden[:, 0] @ weight.t()), labels[0], reduction="none")
    wanted = (losses * mask[0]).sum() / mask.sum()
    assert float(found.weight) == int(found.weight) == round(100 * sum(WEIGHTS))
    assert float(found.total / found.weight) == pytest.approx(float(wanted), rel=1e-6)
    (ours,) = torch.autograd.grad(found.total / found.weight, hidden)
    (theirs,) = torch.autograd.grad(wanted, hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
