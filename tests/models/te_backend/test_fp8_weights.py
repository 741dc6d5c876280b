"""The tensors that replace FP8 weights while they are initialised; the weights themselves need a GPU (tests/gpu)."""

import torch

from megatron_qwen.models.te_backend import fp8_weights


def test_plain_weights_are_filled_in_their_place(monkeypatch):
    monkeypatch.setattr(fp8_weights, "is_float8tensor", lambda tensor: getattr(tensor, "held", False))
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    held, other = module[0].weight, module[1].weight
    held.held = True
    with fp8_weights.plain_weights([module]):
        assert module[0].weight is not held
        assert module[1].weight is other
        with torch.no_grad():
            module[0].weight.fill_(0.3)
            assert not torch.equal(held, module[0].weight)
    assert module[0].weight is held
    assert torch.equal(held, torch.full((2, 3), 0.3))
    assert torch.equal(held._high_precision_init_val, held)
