"""Initial weights that do not depend on the layout.

Every weight matrix is drawn in blocks of rows, each from a generator seeded by (seed, tensor name, layer, expert,
block). A rank draws the blocks that overlap its slice and keeps its part. So the same seed gives the same model under
any tensor, pipeline, expert or data parallelism, and no rank holds a whole large tensor.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import xxhash
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_qwen import device
from megatron_qwen.config.run import RunConfig
from megatron_qwen.models.sharding import Slice, slices
from megatron_qwen.models.te_backend.fp8_weights import plain_weights

# Part of what a seed means: another number of rows gives another model. A thread holds one block, 115 MiB for the
# widest matrix of the 72B (29,568 columns in fp32). Chosen by hand.
_BLOCK_ROWS = 1024
_OF_EMBEDDING = "word_embeddings_lora.embed_tokens.lora_A"
_RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialise(modules: Sequence[GPTModel], config: RunConfig, groups: ProcessGroupCollection) -> None:
    """Initialises the parameters of this rank's chunks: matrices normal, biases 0, norm weights 1.

    Of an adapter ``lora_A`` is uniform within 1 / sqrt(inputs), as in PEFT (Kaiming's with a = sqrt(5)), and ``lora_B``
    is 0 (an embedding's ``lora_A`` is normal), so that the model begins as its base.
    """
    model = config.model
    residual_std = model.init_method_std
    if model.scale_output_init:
        residual_std /= math.sqrt(2 * model.num_layers)
    with plain_weights(modules):
        _fill_all(modules, config, groups, residual_std)
        # The threads launch on the default CUDA stream, which need not be the current one of this thread.
        device.synchronize()


def _fill_all(
    modules: Sequence[GPTModel], config: RunConfig, groups: ProcessGroupCollection, residual_std: float
) -> None:
    model = config.model
    for part in slices(modules, groups):
        if part.name.endswith(("layer_norm_weight", "layernorm.weight")):
            part.data.fill_(1.0)
        elif part.name.endswith(("bias", "lora_B")):
            part.data.zero_()
        elif part.name.endswith(_OF_EMBEDDING):
            _fill(part, partial(_normal, std=1.0), config.training.seed)
        elif part.name.endswith("lora_A"):
            _fill(part, partial(_uniform, bound=part.global_shape[1] ** -0.5), config.training.seed)
        else:
            assert len(part.global_shape) == 2, part.name
            std = residual_std if part.name.endswith(_RESIDUAL_OUTPUTS) else model.init_method_std
            _fill(part, partial(_normal, std=std), config.training.seed)


def _normal(rows: torch.Tensor, generator: torch.Generator, *, std: float) -> torch.Tensor:
    return rows.normal_(0.0, std, generator=generator)


def _uniform(rows: torch.Tensor, generator: torch.Generator, *, bound: float) -> torch.Tensor:
    return rows.uniform_(-bound, bound, generator=generator)


def _fill(part: Slice, distribution: Callable[[torch.Tensor, torch.Generator], torch.Tensor], seed: int) -> None:
    width = part.global_shape[1]
    local = part.data.view(-1, part.data.shape[-1])  # [rows, columns]: without leading dimensions of size one
    start, column = part.offset
    stop = start + local.shape[0]

    @torch.no_grad()  # grad mode is per thread
    def draw(block: int) -> None:
        first = block * _BLOCK_ROWS
        key = f"{seed}/{part.name}/{'/'.join(map(str, part.leading))}/{block}"
        generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(key.encode()) & (2**63 - 1))
        # Always a full block: a generator's n-th number may depend on how many are asked for.
        rows = distribution(torch.empty(_BLOCK_ROWS, width), generator)
        low, high = max(start, first), min(stop, first + _BLOCK_ROWS)
        local[low - start : high - start] = rows[low - first : high - first, column : column + local.shape[1]].to(
            local.device
        )

    blocks = range(start // _BLOCK_ROWS, -(-stop // _BLOCK_ROWS))
    if len(blocks) == 1:
        draw(blocks[0])  # starting a thread takes longer than drawing a small tensor
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(draw, blocks))
