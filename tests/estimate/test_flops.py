"""FLOPs per token against torch's own count of transformers' models, a count by hand and the published formula."""

import pytest

from megatron_qwen.estimate.flops import training_flops_per_token
from megatron_qwen.recipes.registry import RECIPES
from tests.training.reference import KINDS

# A layer of tiny_dense: Q and output 64 x 64, K and V 64 x 32, SwiGLU 3 x 64 x 128.
DENSE_LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
# A layer of tiny_moe: the same attention, a router for 4 experts, 2 experts of width 64, a shared one of 128, its gate.
MOE_LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 4 * 64 + 2 * 3 * 64 * 64 + 3 * 64 * 128 + 64
OUTPUT = 320 * 64
# Biases of Q, K and V and two norms a layer, and the last norm: counted as parameters, though they are no matrices.
VECTORS = 4 * (64 + 32 + 32 + 2 * 64) + 64


def by_hand(matrices: int, *, layers: int, width: int, length: int) -> int:
    """6 x scalars of the matrices that a token meets, and 12 x layers x attention width x positions.

    A GEMM takes 2 FLOPs per scalar, and the backward pass has two of the same size. Scores and values are two GEMMs of
    width x positions.
    """
    return 6 * matrices + 3 * 2 * 2 * layers * width * length


@pytest.mark.parametrize(("recipe", "layer"), [("tiny_dense", DENSE_LAYER), ("tiny_moe", MOE_LAYER)])
@pytest.mark.parametrize("length", [16, 64])
def test_what_torch_counts_in_transformers_model(recipe, layer, length):
    """GEMMs only: the formula's 6 for each bias and norm come on top, and are 0.2 to 0.7 %."""
    import torch
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    kind, shape = KINDS[recipe]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **shape))
    tokens = torch.randint(0, 320, (2, length), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    counted = counter.get_total_flops() / tokens.numel()
    assert counted == by_hand(4 * layer + OUTPUT, layers=4, width=64, length=length)
    assert training_flops_per_token(RECIPES[recipe]().model, length) == counted + 6 * VECTORS


def test_7b_by_the_formula_of_palm():
    """6 N + 12 L H Q T (Chowdhery et al. 2022, appendix B), by the released config.json of Qwen2.5-7B.

    N is the 6,525,621,760 parameters without embeddings that the model card calls 6.53B, and the output matrix.
    """
    layers, heads, channels, length = 28, 28, 128, 4096
    expected = 6 * (6_525_621_760 + 152_064 * 3584) + 12 * layers * heads * channels * length
    assert training_flops_per_token(RECIPES["qwen2_5_7b"]().model, length) == expected


def test_a_tied_output_matrix_is_met_all_the_same():
    model = RECIPES["qwen2_5_0_5b"]().model
    assert model.share_embeddings_and_output_weights
    # 24 layers, 14 heads of 64: 357,898,112 without embeddings, by the technical report.
    expected = 6 * (357_898_112 + 151_936 * 896) + 12 * 24 * 14 * 64 * 2048
    assert training_flops_per_token(model, 2048) == expected
