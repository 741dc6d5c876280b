"""The two sides of ``mq bench layer``: one transformer layer, forward and backward, ours and transformers'."""

import sys
from collections.abc import Callable

from megatron_qwen import device
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.sections import DataConfig, ModelConfig, PrecisionConfig, TrainingConfig
from megatron_qwen.core_patches.install import prepare_process
from tools.dev.benchmarks.turns import serve

BATCH, SEQUENCE = 2, 512
HIDDEN, HEADS, GROUPS, WIDTH = 512, 8, 2, 1408
EXPERTS, CHOSEN, EXPERT_WIDTH = 16, 4, 256


def config(kind: str, dtype: str) -> RunConfig:
    """One dense or sparse layer of about the demo's width."""
    moe = {"num_moe_experts": EXPERTS, "moe_router_topk": CHOSEN, "moe_ffn_hidden_size": EXPERT_WIDTH}
    return RunConfig(
        recipe="custom",
        model=ModelConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            ffn_hidden_size=WIDTH,
            num_attention_heads=HEADS,
            num_query_groups=GROUPS,
            vocab_size=256,
            max_position_embeddings=1024,
            add_qkv_bias=kind == "dense",
            qk_layernorm=kind == "moe",
            moe_router_pre_softmax=False,
            moe_router_load_balancing_type="none",
            **(moe if kind == "moe" else {}),  # type: ignore[arg-type]
        ),
        precision=PrecisionConfig(dtype="bf16" if dtype == "bf16" else "fp32"),
        data=DataConfig(seq_length=SEQUENCE),
        training=TrainingConfig(micro_batch_size=BATCH, global_batch_size=BATCH),
    )


def ours(kind: str, dtype: str) -> Callable[[], object]:
    """A layer of this project, wrapped for data parallelism as in a run."""
    prepare_process()
    import torch

    from megatron_qwen.distributed import groups as process_groups
    from megatron_qwen.distributed.rank import RankInfo, join
    from megatron_qwen.models.backend import choose
    from megatron_qwen.models.build import build_model, for_one_rank

    join(RankInfo(0, 1, 0, 1, "127.0.0.1", 0), timeout_minutes=5)
    run, place = config(kind, dtype), device.current()
    backend = choose(run.precision)
    run = for_one_rank(run, backend)
    groups = process_groups.of_one_rank(seed=1)
    model = build_model(run, groups, backend, device=place)
    model.train()
    (module,), (chunk,) = model.modules, model.chunks
    layer = module.decoder.layers[0]
    kind_of_number = torch.bfloat16 if dtype == "bf16" else torch.float32
    hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, device=place, dtype=kind_of_number, requires_grad=True)
    gradient = torch.randn_like(hidden)
    angles = module.rotary_pos_emb(SEQUENCE)

    def work() -> None:
        hidden.grad = None
        chunk.zero_grad_buffer()
        output, _ = layer(hidden, attention_mask=None, rotary_pos_emb=angles)
        output.backward(gradient)

    return work


def transformers(kind: str, dtype: str) -> Callable[[], object]:
    """The peer: Qwen2's decoder layer, or Qwen3-MoE's."""
    import torch
    from transformers import Qwen2Config, Qwen3MoeConfig
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeRotaryEmbedding

    place = device.current()
    shape = {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 1024,
        "attn_implementation": "sdpa",
    }
    if kind == "dense":
        settings = Qwen2Config(**shape)
        layer, rotary = Qwen2DecoderLayer(settings, 0), Qwen2RotaryEmbedding(settings)
    else:
        experts = {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": EXPERT_WIDTH}
        settings = Qwen3MoeConfig(**shape, **experts, head_dim=HIDDEN // HEADS, norm_topk_prob=True)
        layer, rotary = Qwen3MoeDecoderLayer(settings, 0), Qwen3MoeRotaryEmbedding(settings)
        for parameter in layer.parameters():  # an empty one would send all tokens to the same experts
            torch.nn.init.normal_(parameter, std=0.02)
    layer.to(place)
    hidden = torch.randn(BATCH, SEQUENCE, HIDDEN, device=place, requires_grad=True)
    gradient = torch.randn_like(hidden)
    positions = torch.arange(SEQUENCE, device=place)[None]
    embeddings = rotary(hidden, positions)

    def work() -> None:
        hidden.grad = None
        layer.zero_grad(set_to_none=True)
        with torch.autocast(place.type, dtype=torch.bfloat16, enabled=dtype == "bf16"):
            output = layer(hidden, position_embeddings=embeddings, attention_mask=None, position_ids=positions)
        output = output[0] if isinstance(output, tuple) else output
        output.backward(gradient.to(output.dtype))

    return work


if __name__ == "__main__":
    side, kind, dtype, threads = sys.argv[1:]
    device.set_threads(int(threads))
    serve({"ours": ours, "transformers": transformers}[side](kind, dtype))
