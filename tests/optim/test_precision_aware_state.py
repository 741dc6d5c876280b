"""Main weights kept as bf16 weights and the 16 bits they lack are exact, whatever the bits."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_qwen.optim.precision_aware_state import join_main_weights, split_main_weights


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50))
def test_there_and_back(bits):
    main = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    weights, remainder = split_main_weights(main)
    assert weights.dtype == torch.bfloat16
    assert remainder.dtype == torch.int16
    assert torch.equal(join_main_weights(weights, remainder).view(torch.int32), main.view(torch.int32))


def test_weights_are_the_nearest():
    main = torch.randn(10_000)
    weights, _ = split_main_weights(main)
    ties = (main.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weights[~ties], main.bfloat16()[~ties])


def test_zero_rest_is_the_weight_itself():
    weights = torch.randn(1000).bfloat16()
    assert torch.equal(join_main_weights(weights, torch.zeros(1000, dtype=torch.int16)), weights.float())
