"""A rank of ``mq bench checkpoint``: steps with and without a save under way, and a save that training waits for."""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from megatron_qwen.core_patches.install import prepare_process
from megatron_qwen.files import sync
from tools.dev.benchmarks.train_step_workers import bench_config

_STEPS = 4


def main(data_path: str, folder: str, rounds: int) -> dict[str, Any]:
    """Seconds of steps, by round, and what a save takes."""
    prepare_process()
    import torch.distributed as dist

    from megatron_qwen.attempts import AttemptLog
    from megatron_qwen.checkpoint.write import CheckpointWriter
    from megatron_qwen.distributed.rank import RankInfo, join
    from megatron_qwen.training.build import build_components
    from megatron_qwen.training.callbacks.checkpointing import Checkpointing
    from megatron_qwen.training.callbacks.garbage import GarbageCollection
    from megatron_qwen.training.trainer import Trainer

    info = RankInfo.from_environment()
    join(info, timeout_minutes=10)
    config = bench_config("fp32", data_path).with_section("training", micro_batch_size=1, global_batch_size=16)
    components, root = build_components(config), Path(folder)
    trainer = Trainer(components, [GarbageCollection(interval=100)])  # as every run of several ranks has it
    trainer.callbacks[0].before_training(trainer)
    writer = CheckpointWriter(
        root / "checkpoints", attempt=0, attempts=AttemptLog(root / "attempts.jsonl"), keep_last=1, keep_every=None
    )
    checkpointing = Checkpointing(writer, saved=0, tokenizer=None)
    for _ in range(3):
        trainer.step()

    def normal_steps() -> float:
        """Seconds of a step."""
        started = time.perf_counter()
        for _ in range(_STEPS):
            trainer.step()
        dist.barrier()
        return (time.perf_counter() - started) / _STEPS

    def steps_while_saving() -> tuple[float, float, int]:
        """Seconds of a step from the start of a save to its commit, of the call that starts it, and steps between."""
        started, steps = time.perf_counter(), 0
        checkpointing.save(trainer.components, background=True)
        stall = time.perf_counter() - started
        while True:
            trainer.step()
            steps += 1
            if writer.is_written():
                writer.finish()
                break
        dist.barrier()
        return (time.perf_counter() - started) / steps, stall, steps

    normal, saving, stalls, steps = [], [], [], []
    for _ in range(rounds):
        normal.append(normal_steps())
        seconds, stall, count = steps_while_saving()
        saving.append(seconds)
        stalls.append(stall)
        steps.append(count)
    waited, copied = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        checkpointing.save(trainer.components, background=False)
        waited.append(time.perf_counter() - started)
        copied.append(_copy_seconds(root) if info.rank == 0 else 0.0)
        dist.barrier()
    size = sum(path.stat().st_size for path in (root / "checkpoints").rglob("*") if path.is_file())
    result = {"normal": normal, "saving": saving, "stalls": stalls, "steps": steps}
    local, written = _local_seconds(components, root / "local", rounds)
    dist.destroy_process_group()
    return {**result, "waited": waited, "copied": copied, "bytes": size, "local": local, "local_written": written}


def _local_seconds(components: Any, directory: Path, rounds: int) -> tuple[list[float], list[float]]:
    """What training waits for a local checkpoint, with every rank on a node of its own, and until it is written."""
    import torch.distributed as dist

    from megatron_qwen.checkpoint.local.nodes import Nodes
    from megatron_qwen.training.callbacks.local_checkpoints import LocalCheckpoints
    from megatron_qwen.training.local_resume import LocalPlace

    nodes = Nodes(tuple(f"n{rank}" for rank in range(dist.get_world_size())))
    place = LocalPlace(directory / nodes.of_rank[dist.get_rank()] / "run", nodes, "0" * 16)
    local = LocalCheckpoints(place, attempt=1, committed=lambda: 0)
    waited, written = [], []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        local.save(components)
        dist.barrier()
        waited.append(time.perf_counter() - started)
        local.close()
        dist.barrier()
        written.append(time.perf_counter() - started)
        components.progress.iteration += 1
    return waited[1:], written[1:]  # the first takes memory for the copy


def _copy_seconds(root: Path) -> float:
    """What cp and a sync of the same files take."""
    target = root / "copy"
    started = time.perf_counter()
    shutil.copytree(root / "checkpoints", target)
    for path in target.rglob("*"):
        if path.is_file():
            sync(path)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
