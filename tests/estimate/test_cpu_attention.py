"""What attention on a CPU keeps is what the kernels keep, whichever of them computes."""

import pytest
import torch

from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.sections import DataConfig, ModelConfig
from megatron_qwen.estimate.cpu_attention import kept
from megatron_qwen.models.torch_backend.causal_attention import BlockwiseCausalAttention, pays

BATCH, HEADS, GROUPS, WIDTH = 2, 4, 2, 16


def asked(length: int, **parallel: int) -> RunConfig:
    model = ModelConfig(
        num_layers=2,
        hidden_size=HEADS * WIDTH,
        ffn_hidden_size=64,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        vocab_size=256,
        max_position_embeddings=4096,
    )
    config = RunConfig(recipe="custom", model=model, data=DataConfig(seq_length=length))
    config = config.with_section("parallel", **parallel)
    return config.with_section("training", micro_batch_size=BATCH, global_batch_size=BATCH)


def saved_scalars(queries: int, keys: int) -> int:
    """What the backward pass finds beside its inputs."""
    query = torch.randn(BATCH, HEADS, queries, WIDTH, requires_grad=True)
    key, value = (torch.randn(BATCH, GROUPS, keys, WIDTH, requires_grad=True) for _ in range(2))
    assert pays(query, key)
    out = BlockwiseCausalAttention.apply(query, key, value, 0.25, True)
    inputs = {tensor.data_ptr() for tensor in (query, key, value)}
    return sum(tensor.numel() for tensor in out.grad_fn.saved_tensors if tensor.data_ptr() not in inputs)


@pytest.mark.parametrize("length", [512, 500])
def test_blocks_keep_their_probabilities(length):
    assert kept(asked(length)) * BATCH * length == saved_scalars(length, length)


def test_of_context_parallel_ranks_the_fullest_counts():
    # Chunks of 256 queries: the first, which sees 256 keys, is too little work for blocks.
    first = BATCH * HEADS * 256 * WIDTH + saved_scalars(256, 1024)
    second = saved_scalars(256, 512) + saved_scalars(256, 768)
    assert first != second
    assert kept(asked(1024, context_parallel_size=2)) * BATCH * 512 == max(first, second)


def test_torchs_kernel_keeps_its_output():
    small, long = asked(64), asked(2048)
    dropout = asked(512).with_section("model", attention_dropout=0.1)
    assert [kept(config) for config in (small, long, dropout)] == [HEADS * WIDTH] * 3
    assert kept(asked(64, tensor_model_parallel_size=2)) == HEADS * WIDTH / 2


def test_documents_of_a_long_row_may_be_short_enough_for_blocks():
    whole = asked(2048)
    assert kept(whole.with_section("data", reset_attention_mask=True)) == kept(asked(1024)) > kept(whole)
