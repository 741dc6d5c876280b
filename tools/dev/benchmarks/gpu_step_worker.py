"""One configuration of ``mq bench gpu_step`` in a process of its own: steps, their times and losses, as JSON."""

import json
import sys
import time
from dataclasses import asdict, dataclass

from megatron_qwen import device
from megatron_qwen.core_patches.install import prepare_process

_HELD_OUT = 0.1  # of the documents, where a case is validated


@dataclass(frozen=True)
class Case:
    """What a process trains.

    Args:
        recipe: shape, by recipe.
        backend: ``te`` or ``torch``.
        fp8: recipe of FP8; None is bf16.
        micro_batch_size: sequences at once.
        global_batch_size: sequences of a step.
        steps: after ``warm_up`` ones.
        data: prefix of the tokens.
        warm_up: steps that do not count.
        overrides: further fields.
        profile: prints the kernels of one more step to stderr.
        validation: sequences held out, whose loss is measured after the last step.
    """

    recipe: str
    backend: str
    fp8: str | None
    micro_batch_size: int
    global_batch_size: int
    steps: int
    data: str
    warm_up: int = 2
    overrides: tuple[str, ...] = ()
    profile: bool = False
    validation: int = 0


@dataclass(frozen=True)
class Measured:
    """What came of it.

    Args:
        device: name of the GPU.
        seconds: of every step that counts.
        tokens_per_second: at the median step.
        tflops: model TFLOP/s at the median step, by ``estimate/flops.py``.
        mfu: of the GPU's bf16 peak; None where it is not known.
        peak_gib: most memory allocated at once.
        losses: of every step, the warm-up's too.
        start_s: from the process's first line to its first step.
        validation_loss: of ``Case.validation`` sequences after the last step; None where there are none.
    """

    device: str
    seconds: list[float]
    tokens_per_second: float
    tflops: float
    mfu: float | None
    peak_gib: float
    losses: list[float]
    start_s: float
    validation_loss: float | None = None


def overrides(case: Case) -> list[str]:
    """The fields that make a recipe's shape a run on one device."""
    return [
        "parallel.tensor_model_parallel_size=1",
        "parallel.pipeline_model_parallel_size=1",
        "parallel.virtual_pipeline_model_parallel_size=null",
        "parallel.expert_model_parallel_size=1",
        "parallel.expert_tensor_parallel_size=null",
        "parallel.context_parallel_size=1",
        "parallel.sequence_parallel=false",
        f"precision.backend={case.backend}",
        f"precision.fp8={case.fp8 or 'null'}",
        f"training.micro_batch_size={case.micro_batch_size}",
        f"training.global_batch_size={case.global_batch_size}",
        f"training.train_iters={case.warm_up + case.steps}",
        f"training.eval_iters={case.validation // case.global_batch_size}",
        "training.recompute_granularity=none",
        f"data.validation_fraction={_HELD_OUT if case.validation else 0}",
        f"data.path={case.data}",
        "optim.learning_rate=3e-4",
        "optim.lr_warmup_iters=20",
        *case.overrides,
    ]


def measure(case: Case) -> Measured:
    """Trains on one device."""
    born = time.perf_counter()
    prepare_process()
    from megatron_qwen.config.source import resolve
    from megatron_qwen.distributed.rank import RankInfo, join
    from megatron_qwen.estimate.flops import training_flops_per_token
    from megatron_qwen.estimate.hardware import peak_tflops
    from megatron_qwen.recipes.registry import RECIPES
    from megatron_qwen.training.build import build_components
    from megatron_qwen.training.callbacks.validation import Validation
    from megatron_qwen.training.trainer import Trainer

    config = resolve(case.recipe, overrides(case), RECIPES)
    join(RankInfo(0, 1, 0, 1, "127.0.0.1", 0), timeout_minutes=5)
    trainer = Trainer(build_components(config), [])
    started = time.perf_counter() - born
    records = [trainer.step() for _ in range(case.warm_up + case.steps)]
    seconds = [record.step_time_s for record in records[case.warm_up :]]
    speed = config.training.global_batch_size * config.data.seq_length / sorted(seconds)[len(seconds) // 2]
    tflops = speed * training_flops_per_token(config.model, config.data.seq_length) / 1e12
    peak = peak_tflops(device.device_name(), config.precision.dtype)
    result = Measured(
        device=device.device_name(),
        seconds=seconds,
        tokens_per_second=speed,
        tflops=tflops,
        mfu=tflops / peak if peak else None,
        peak_gib=device.peak_memory_bytes() / 2**30,
        losses=[record.result.loss for record in records],
        start_s=started,
        validation_loss=Validation().measure(trainer) if case.validation else None,
    )
    if case.profile:
        _profile(trainer.step)
    return result


def _profile(step: object) -> None:
    from torch.profiler import ProfilerActivity, profile

    assert callable(step)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
    table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=70)
    lines = [line[:72] + line[-70:] for line in table.splitlines()]
    print("\n".join(lines), file=sys.stderr, flush=True)


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    print(json.dumps(asdict(measure(Case(**{**fields, "overrides": tuple(fields.get("overrides", ()))})))), flush=True)
