"""Builds the model chunks of a rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.sections import PerformanceConfig
from megatron_qwen.device import has_cuda
from megatron_qwen.distributed.groups import is_first_stage, is_last_stage
from megatron_qwen.estimate.choices import choose
from megatron_qwen.estimate.machine import Machine
from megatron_qwen.models.backend import Backend
from megatron_qwen.models.core_config import transformer_config
from megatron_qwen.models.initialise import initialise
from megatron_qwen.models.layer_spec import block_spec
from megatron_qwen.models.lora.attach import attach
from megatron_qwen.models.qwen_model import QwenModel
from megatron_qwen.models.te_backend import provider as te_backend
from megatron_qwen.models.vocabulary import padded_vocab_size


@dataclass(frozen=True)
class Model:
    """The model chunks of this rank, and their megatron-core configuration.

    Args:
        core: megatron-core's configuration.
        chunks: wrapped for data parallelism, in the order of their virtual stages.
    """

    core: TransformerConfig
    chunks: list[DistributedDataParallel]

    @property
    def modules(self) -> list[GPTModel]:
        """The bare GPTModel of each chunk."""
        return [unwrapped(chunk) for chunk in self.chunks]

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Context in which every rank holds all its parameters as the last step updated them.

        With parallel.overlap_param_gather they are otherwise all-gathered by the next forward pass. A checkpoint or a
        validation in between would see partly stale weights.
        """
        late = [chunk for chunk in self.chunks if chunk.ddp_config.overlap_param_gather]
        for chunk in late:
            chunk.disable_forward_pre_hook(param_sync=True)
        try:
            yield
        finally:
            for chunk in late:
                chunk.enable_forward_pre_hook()

    def set_rotary_base(self, base: float) -> None:
        """Changes the RoPE base, which a data stage may set."""
        for module in self.modules:
            if hasattr(module, "rotary_pos_emb") and module.rotary_base != base:
                module.rotary_pos_emb = RotaryEmbedding(
                    self.core.kv_channels, rotary_percent=1.0, rotary_base=base, cp_group=module.pg_collection.cp
                )
                module.rotary_base = base

    def train(self, mode: bool = True) -> None:
        """Sets training or evaluation mode."""
        for chunk in self.chunks:
            chunk.train(mode)


def build_model(config: RunConfig, groups: ProcessGroupCollection, backend: Backend, *, device: torch.device) -> Model:
    """Builds, initialises and wraps the chunks of this rank.

    Args:
        config: the run.
        groups: the groups of this rank.
        backend: the backend whose modules the layers use.
        device: device of the parameters.
    """
    core = transformer_config(config, backend)
    virtual = config.parallel.virtual_stages
    if config.performance.tp_comm_overlap:
        te_backend.start_tensor_overlap(config)
    adapters = config.lora.rank is not None
    modules = [
        _chunk(config, core, groups, backend, vp_stage=stage if virtual > 1 else None, adapters=adapters)
        for stage in range(virtual)
    ]
    for module in modules:
        attach(module, config, groups)
        module.to(device)
    initialise(modules, config, groups)
    if backend.name == "te":
        te_backend.add_into_main_gradients(modules)
    if core.bf16:
        modules = [Float16Module(core, module) for module in modules]
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.precision.grad_reduce_in_fp32,
        overlap_grad_reduce=bool(config.parallel.overlap_grad_reduce),
        overlap_param_gather=bool(config.parallel.overlap_param_gather),
        fp8_param_gather=bool(config.performance.fp8_param_gather),
        use_distributed_optimizer=True,
    )
    chunks = [
        DistributedDataParallel(core, ddp, module, disable_bucketing=index > 0, pg_collection=groups)
        for index, module in enumerate(modules)
    ]
    return Model(core, chunks)


def for_one_rank(config: RunConfig, backend: Backend) -> RunConfig:
    """The configuration with the preset's choices for one rank, for a model outside a training run.

    Performance fields that the run has set are dropped: they were chosen for its ranks and devices.
    """
    config = replace(config, performance=PerformanceConfig())
    return choose(config, Machine(backend.name, gpu=has_cuda()), world_size=1)[0]


def bare_module(config: RunConfig, groups: ProcessGroupCollection, backend: Backend) -> GPTModel:
    """The model of a single pipeline rank with uninitialised parameters, for callers that load and then run it.

    Args:
        config: the run; one pipeline stage.
        groups: the groups of this rank.
        backend: whose modules the layers are made of.
    """
    return bare_chunk(for_one_rank(config, backend), groups, backend)


def bare_chunk(config: RunConfig, groups: ProcessGroupCollection, backend: Backend) -> GPTModel:
    """The model chunk of this rank with uninitialised parameters, without virtual stages.

    Args:
        config: the run, with the choices of ``estimate/choices.py``.
        groups: the groups of this rank.
        backend: whose modules the layers are made of.
    """
    return _chunk(config, transformer_config(config, backend), groups, backend, vp_stage=None)


def _chunk(
    config: RunConfig,
    core: TransformerConfig,
    groups: ProcessGroupCollection,
    backend: Backend,
    *,
    vp_stage: int | None,
    adapters: bool = False,
) -> GPTModel:
    model = config.model
    last = config.parallel.virtual_stages - 1
    return QwenModel(
        config=core,
        transformer_layer_spec=block_spec(
            core, backend, vp_stage=vp_stage, pp_rank=groups.pp.rank(), adapters=adapters
        ),
        vocab_size=padded_vocab_size(model.vocab_size, config.parallel.tensor_model_parallel_size),
        max_sequence_length=config.data.seq_length,
        pre_process=is_first_stage(groups) and (vp_stage or 0) == 0,
        post_process=is_last_stage(groups) and (vp_stage or 0) == last,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=config.rope.base,
        pg_collection=groups,
        vp_stage=vp_stage,
    )


def unwrapped(module: Any) -> GPTModel:
    """The bare GPTModel of a chunk."""
    while not isinstance(module, GPTModel):
        module = module.module
    return module
