"""What the ranks of a pool are asked to do."""

import hashlib
import itertools
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_qwen.config.run import RunConfig
from tests.rank_pool import rank_info


def train(config: RunConfig, steps: int, save_to: Path | None = None) -> dict[str, Any]:
    """Trains some steps on a fresh model.

    Returns:
        Losses and gradient norms; the state is saved as a checkpoint where ``save_to`` says so.
    """
    from megatron_qwen.training.build import build_components

    components = build_components(config)
    results = [step(components) for _ in range(steps)]
    if save_to is not None:
        save(components, save_to)
    return {"losses": [result.loss for result in results], "grad_norms": [result.grad_norm for result in results]}


def step(components: Any) -> Any:
    """One optimizer step as the trainer takes it."""
    from megatron_qwen.training.trainer import Trainer

    return Trainer(components, []).step().result


def save(components: Any, root: Path, *, noted: dict[str, Any] | None = None) -> None:
    """Commits the state as a checkpoint under ``root``; ``noted`` is what state.json has in addition."""
    from megatron_qwen.attempts import AttemptLog
    from megatron_qwen.checkpoint.write import CheckpointWriter
    from megatron_qwen.training.callbacks.checkpointing import Checkpointing

    outside_of_runs = AttemptLog(Path(tempfile.mkdtemp()) / "attempts.jsonl")
    writer = CheckpointWriter(root, attempt=0, attempts=outside_of_runs, keep_last=9, keep_every=None)
    Checkpointing(writer, saved=0, tokenizer=None, noted=noted).save(components, background=False)


def load_and_save(config: RunConfig, source: Path, out: Path) -> dict[str, Any]:
    """Loads a checkpoint under this layout, saves it again, and takes one more step."""
    from megatron_qwen.rundir import RunDirectory
    from megatron_qwen.training.build import build_components
    from megatron_qwen.training.resume import resume

    components = build_components(config)
    directory = RunDirectory(source.parent)
    assert directory.checkpoints == source
    resume(components, directory)
    save(components, out)
    return {"loss": step(components).loss, "iteration": components.progress.iteration}


def start_from(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """Starts a run from ``checkpoint.load``, saves the state at once, and takes one step."""
    from megatron_qwen.rundir import RunDirectory
    from megatron_qwen.training.build import build_components
    from megatron_qwen.training.resume import resume

    components = build_components(config)
    directory = RunDirectory(run_dir)
    resume(components, directory)
    save(components, directory.checkpoints)
    return {"loss": step(components).loss, "iteration": components.progress.iteration}


def attempt(config: RunConfig, run_dir: Path) -> int:
    """One attempt at a run, as a rank of ``mq train`` makes it."""
    from megatron_qwen.resilience.signals import StopSignals
    from megatron_qwen.training.attempt import run_attempt

    return run_attempt(config, rank_info(), StopSignals(), run_dir)


def tensor_hashes(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a checkpoint, whatever layout wrote it; in the calling process."""
    from megatron_qwen.checkpoint.read import CheckpointReader

    reader = CheckpointReader(checkpoint)
    return {
        name: hashlib.sha256(
            reader.read(name).contiguous().flatten().view(dtype=_bytes()).numpy().tobytes()
        ).hexdigest()
        for name in sorted(reader.tensors())
    }


def _bytes() -> Any:
    import torch

    return torch.uint8


def with_layout(config: RunConfig, layout: dict[str, Any]) -> RunConfig:
    """The configuration under another layout; ``recompute`` sets training's recompute granularity."""
    layout = dict(layout)
    recompute = layout.pop("recompute", None)
    if recompute:
        config = replace(config, training=replace(config.training, recompute_granularity=recompute))
    return config.with_section("parallel", **layout)


def peak_memory(config: RunConfig) -> dict[str, Any]:
    """Bytes this rank holds all the time, by part, and the most its tensors take in a step."""
    from megatron_qwen.training.build import build_components
    from megatron_qwen.training.held_memory import held_bytes, held_tensors
    from tests.distributed.tensor_peak import TensorPeak

    components = build_components(config)
    step(components)
    held = held_bytes(components)
    with TensorPeak(itertools.chain(*held_tensors(components).values())) as counted:
        step(components)
    return {"stage": components.groups.pp.rank(), "held": held, "step": counted.peak}


def _kinds(part: Any) -> tuple[str, ...]:
    return ("param", *part.optimizer_state_keys)


def with_buckets(config: RunConfig, bucket_size: int | None) -> Any:
    """A run with gradient buckets of so many scalars; megatron-core's default is larger than these models."""
    from megatron_qwen.models import build
    from megatron_qwen.training.build import build_components

    plain = build.DistributedDataParallelConfig
    if bucket_size is not None:
        build.DistributedDataParallelConfig = partial(plain, bucket_size=bucket_size)  # type: ignore[misc,assignment]
    try:
        components = build_components(config)
    finally:
        build.DistributedDataParallelConfig = plain  # type: ignore[misc]
    # The core has one bucket on the later stages of a pipeline.
    buckets = len(components.model.chunks[0].buffers[0].buckets)
    assert bucket_size is None or buckets > 3 or components.groups.pp.rank() > 0
    return components


def train_in_buckets(config: RunConfig, steps: int, bucket_size: int) -> list[float]:
    """Losses of some steps."""
    components = with_buckets(config, bucket_size)
    return [step(components).loss for _ in range(steps)]


def gathered_states(config: RunConfig, bucket_size: int | None = None) -> list[tuple[str, int, float]]:
    """Of every kind of state: parameters that this rank gathered whole, and the largest difference from their shards.

    Every rank says what it holds of each parameter; whoever gathered it compares, as if the gather did not exist.
    """
    import torch.distributed as dist

    components = with_buckets(config, bucket_size)
    step(components)
    compared = []
    for part in components.optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        found, group = part.get_parameter_state_dp_zero(), part.data_parallel_group_gloo
        for index, ranges in enumerate(part.gbuf_ranges):
            buffer, ((dtype, buckets),) = part.buffers[index], ranges.items()
            number = {parameter: place for place, parameter in enumerate(buffer.param_index_map)}
            mine = []
            for content in buckets:
                for parameter, places in content["param_map"].items():
                    tensors = part._get_main_param_and_optimizer_states(parameter)
                    span = (places["param"].start, places["param"].end)
                    mine.append((number[parameter], span, {key: tensors[key].clone() for key in _kinds(part)}))
            everyone: list[Any] = [None] * group.size()
            dist.all_gather_object(everyone, mine, group=group)
            places = list(buffer.param_index_map.values())
            for key, whole in found[index][dtype].items():
                gaps = [
                    float((whole[places[which][0] + begin : places[which][0] + end] - shards[key].view(-1)).abs().max())
                    for rank in everyone
                    for which, (begin, end), shards in rank
                    if end > begin
                ]
                compared.append((key, len({which for rank in everyone for which, _, _ in rank}), max(gaps)))
    return compared
