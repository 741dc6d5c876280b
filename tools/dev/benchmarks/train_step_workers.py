"""The two sides of ``mq bench train_step``: one process each, told over stdin to run a number of steps.

Both train the same Qwen2 shape on the same kind of batch and keep their state from call to call.
"""

import sys
from collections.abc import Callable
from typing import Any

from megatron_qwen import device
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.sections import DataConfig, ModelConfig, OptimConfig, PrecisionConfig, TrainingConfig
from megatron_qwen.core_patches.install import prepare_process
from tools.dev.benchmarks.turns import serve

BATCH, SEQUENCE = 4, 512
LEARNING_RATE = 3e-4


def bench_config(dtype: str, data_path: str | None = None) -> RunConfig:
    """The 15.7M-parameter model: hidden 384, FFN 1024, 8 layers, 6 / 2 heads, vocabulary 8192, tied."""
    return RunConfig(
        recipe="custom",
        model=ModelConfig(
            num_layers=8,
            hidden_size=384,
            ffn_hidden_size=1024,
            num_attention_heads=6,
            num_query_groups=2,
            vocab_size=8192,
            max_position_embeddings=1024,
            share_embeddings_and_output_weights=True,
        ),
        precision=PrecisionConfig(dtype="bf16" if dtype == "bf16" else "fp32"),
        data=DataConfig(path=data_path, seq_length=SEQUENCE, validation_fraction=0.0),
        optim=OptimConfig(learning_rate=LEARNING_RATE, lr_decay_style="constant"),
        # As many steps as a run has that compiles its kernels.
        training=TrainingConfig(micro_batch_size=BATCH, global_batch_size=BATCH, eval_iters=0, train_iters=20_000),
    )


def ours(dtype: str, data_path: str) -> Callable[[], float]:
    """A training step of this project; the call returns the loss."""
    prepare_process()
    from megatron_qwen.distributed.rank import RankInfo, join
    from megatron_qwen.training.build import build_components
    from megatron_qwen.training.trainer import Trainer

    config, info = bench_config(dtype, data_path), RankInfo(0, 1, 0, 1, "127.0.0.1", 0)
    join(info, timeout_minutes=5)
    trainer = Trainer(build_components(config), [])
    return lambda: trainer.step().result.loss


def peer_model() -> Any:
    """The model of ``bench_config`` in transformers, with random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = bench_config("fp32").model
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_query_groups,
            max_position_embeddings=shape.max_position_embeddings,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )


def transformers(dtype: str, data_path: str) -> Callable[[], float]:
    """The peer: Qwen2ForCausalLM with torch's fused AdamW, bf16 by autocast."""
    import torch

    from megatron_qwen.data.reading.training_data import TrainingData

    config = bench_config(dtype, data_path)
    model = peer_model().to(device.current())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=config.optim.weight_decay, fused=True
    )
    source = TrainingData(config).at(0)
    taken = 0

    def step() -> float:
        nonlocal taken
        samples = [source[taken * BATCH + index] for index in range(BATCH)]
        tokens = torch.stack([torch.from_numpy(sample.tokens) for sample in samples]).to(model.device)
        labels = torch.stack([torch.from_numpy(sample.labels) for sample in samples]).to(model.device)
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == "bf16"):
            logits = model(input_ids=tokens).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        taken += 1
        return float(loss)

    return step


if __name__ == "__main__":
    side, dtype, data_path, threads = sys.argv[1:]
    device.set_threads(int(threads))
    serve({"ours": ours, "transformers": transformers}[side](dtype, data_path))
