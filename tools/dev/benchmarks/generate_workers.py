"""The sides of ``mq bench generate``: one process each, told over stdin to answer a batch of prompts some times.

All have the model of ``mq bench train_step`` with the same weights, and take the most likely token.
"""

import random
import sys
from collections.abc import Callable
from typing import Any

from megatron_qwen.core_patches.install import prepare_process
from tools.dev.benchmarks.train_step_workers import bench_config
from tools.dev.benchmarks.turns import serve

PROMPT, NEW = 128, 64


def prompts(batch: int) -> list[list[int]]:
    """Ids of a batch of prompts, no two of which begin alike."""
    dice = random.Random(batch)
    vocabulary = bench_config("fp32").model.vocab_size
    return [[dice.randrange(vocabulary) for _ in range(PROMPT)] for _ in range(batch)]


def ours(batch: int, new: int) -> Callable[[], float]:
    """The engine; every call has other prompts, so that no beginning is found in the cache."""
    prepare_process()
    from megatron_qwen import device
    from megatron_qwen.distributed import groups as process_groups
    from megatron_qwen.distributed.rank import RankInfo, join
    from megatron_qwen.estimate.choices import choose
    from megatron_qwen.estimate.machine import Machine
    from megatron_qwen.inference.engine import Engine
    from megatron_qwen.inference.loading import inference_config
    from megatron_qwen.inference.request import Request, Sampling
    from megatron_qwen.inference.stage import Stage
    from megatron_qwen.models.backend import choose as choose_backend
    from megatron_qwen.models.build import bare_chunk
    from megatron_qwen.models.initialise import initialise

    join(RankInfo(0, 1, 0, 1, "127.0.0.1", 0), timeout_minutes=5)
    config = inference_config(bench_config("fp32"))
    groups = process_groups.create(config.parallel, seed=0)
    backend = choose_backend(config.precision)
    config = choose(config, Machine(backend.name, gpu=False), world_size=1)[0]
    module = bare_chunk(config, groups, backend).to(device.current())
    initialise([module], config, groups)
    module.eval()
    stage = Stage(module, config, groups, longest=PROMPT + NEW)
    sampling, calls = Sampling(max_new_tokens=new), [0]
    engine = Engine(stage, blocks=4 * batch + 4)

    def call() -> float:
        calls[0] += 1
        asked = [
            Request((calls[0] % 8000, *ids[1:]), sampling, number=number) for number, ids in enumerate(prompts(batch))
        ]
        return float(sum(len(answer.tokens) for _, answer in engine.answer(asked)))

    return call


def transformers(batch: int, new: int, cache: str) -> Callable[[], float]:
    """Qwen2ForCausalLM.generate, with its dynamic or its static cache."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    shape = bench_config("fp32").model
    config = Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(config).eval()
    ids = torch.tensor(prompts(batch))
    how = GenerationConfig(do_sample=False, max_new_tokens=new, min_new_tokens=new, eos_token_id=None, pad_token_id=0)
    if cache == "static":
        how = GenerationConfig(**{**how.to_diff_dict(), "cache_implementation": "static", "disable_compile": True})

    def call() -> float:
        with torch.no_grad():
            found = model.generate(ids, generation_config=how)
        assert found.shape[1] == PROMPT + new, found.shape
        return float(batch * new)

    return call


if __name__ == "__main__":
    side, batch_, new_ = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    serve(ours(batch_, new_) if side == "ours" else transformers(batch_, new_, side))
