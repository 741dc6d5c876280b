"""Main weights kept as bf16 weights and the 16 bits they lack are exact, whatever the bits."""

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_qwen.core_patches import precision_aware_state
from megatron_qwen.core_patches.precision_aware_state import split_weights, whole_weights


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50))
def test_there_and_back(bits):
    whole = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    weights, rest = split_weights(whole)
    assert weights.dtype == torch.bfloat16
    assert rest.dtype == torch.int16
    assert torch.equal(whole_weights(weights, rest).view(torch.int32), whole.view(torch.int32))


def test_weights_are_the_nearest():
    whole = torch.randn(10_000)
    weights, _ = split_weights(whole)
    ties = (whole.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weights[~ties], whole.bfloat16()[~ties])


def test_zero_rest_is_the_weight_itself():
    weights = torch.randn(1000).bfloat16()
    assert torch.equal(whole_weights(weights, torch.zeros(1000, dtype=torch.int16)), weights.float())


class FusedAdam(torch.optim.Optimizer):
    """What Transformer Engine's Adam is here: bf16 weights, the 16 bits that they lack, and moments."""

    store_param_remainders = True

    def __init__(self, whole: torch.Tensor) -> None:
        weights, rest = split_weights(whole)
        super().__init__([torch.nn.Parameter(weights)], {})
        self.rest, self.initialised = rest, []

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
        self.initialised.append((param.dtype, store_param_remainders))

    def state_dict(self) -> dict[str, Any]:
        raise AssertionError("it copies all state in fp32")


def distributed(adam: FusedAdam) -> Any:
    """What megatron-core's DistributedOptimizer does with it: 16 bits out, and 16 bits in."""

    def set_(param: object, tensors: dict[str, torch.Tensor]) -> None:
        assert tensors["param"].dtype == torch.int16
        adam.rest = tensors["param"]

    return SimpleNamespace(
        optimizer=adam,
        init_state_fn=None,
        model_param_group_index_map={"model weight": (0, 0)},
        _get_main_param_and_optimizer_states=lambda param: {"param": adam.rest, "exp_avg": torch.zeros(1)},
        _set_main_param_and_optimizer_states=set_,
    )


def test_a_checkpoint_gets_whole_weights_and_gives_them_back():
    torch.manual_seed(0)
    saved, loaded = torch.randn(50), torch.randn(50)
    adam = FusedAdam(saved)
    part = distributed(adam)
    precision_aware_state.apply(optimizer=part)
    get = part._get_main_param_and_optimizer_states
    precision_aware_state.apply(optimizer=part)
    assert part._get_main_param_and_optimizer_states is get, "applied once"
    assert torch.equal(get("model weight")["param"], saved)
    part._set_main_param_and_optimizer_states("model weight", {"param": loaded})
    assert torch.equal(get("model weight")["param"], loaded)
    assert torch.equal(whole_weights(adam.param_groups[0]["params"][0].detach(), adam.rest), loaded)


def test_state_is_made_with_the_argument_that_transformer_engine_wants():
    adam = FusedAdam(torch.randn(3))
    part = distributed(adam)
    precision_aware_state.apply(optimizer=part)
    part.init_state_fn(adam, None)
    assert adam.initialised == [(torch.bfloat16, True)]
    assert "param_groups" in adam.state_dict(), "torch's own, without a copy of all state"
