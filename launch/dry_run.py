"""``mq launch dry-run``: everything a submission would do, shown and not done."""

import json
from typing import Any

from launch.estimates import RunPrediction
from launch.local_checkpoints import figure
from launch.preflight import Preflight
from launch.quarantined import ToAvoid
from launch.request import SubmitRequest
from launch.submission import script
from megatron_qwen.config.render import to_yaml
from megatron_qwen.config.run import as_dict
from megatron_qwen.estimate.memory import ALLOWANCE_GIB

_GIB = 2.0**30


def figures(request: SubmitRequest, prediction: RunPrediction) -> list[tuple[str, str]]:
    """Name and value of every predicted figure, for people."""
    memory, cluster = prediction.memory, request.cluster
    interval = request.config.checkpoint.save_interval
    often = "as often as loses the least" if interval is None else f"every {interval} iterations"
    rows = [
        ("parameters, total / active", f"{prediction.parameters.total:,} / {prediction.parameters.active:,}"),
        ("ranks", f"{request.world_size:,} = {request.nodes} nodes x {request.ranks_per_node}"),
        *([("spare nodes", f"{request.spares}: {_idle(request)}")] if request.spares else []),
        ("memory of the fullest rank", _memory(prediction)),
        ("  weights, gradients, optimizer", f"{memory.state_gib:.1f} GiB (stage {memory.stage})"),
        ("  activations, logits", f"{(memory.activations + memory.loss) / _GIB:.1f} GiB"),
        ("  allowance for context and buffers", f"{ALLOWANCE_GIB:.1f} GiB"),
        ("checkpoint", f"{prediction.checkpoint / 1e9:,.1f} GB, {often}"),
        *figure(request, prediction),
        ("tokens of the run", f"{prediction.tokens:,}"),
    ]
    if prediction.speed is None or prediction.hours is None or prediction.gpu_hours is None:
        return [*rows, ("speed", "not predicted: the cluster file names no GPU with a known peak for this precision")]
    speed = prediction.speed
    share = f"{speed.achieved:.0%} of a {cluster.gpu}'s peak rates (mq plan)"
    jobs = prediction.hours * 60 / cluster.time_limit_minutes
    idle = prediction.gpu_hours * request.spares / request.nodes
    return [
        *rows,
        ("tokens/s", f"{speed.tokens_per_second:,.0f}, {speed.tokens_per_second / request.world_size:,.0f} a GPU"),
        ("  assumed", f"{share}; pipeline bubble {speed.bubble:.1%}"),
        ("step", f"{speed.step_s:.1f} s"),
        ("duration", f"{prediction.hours:,.1f} h, {jobs:.1f} jobs of {cluster.time_limit}"),
        ("GPU-hours", f"{prediction.gpu_hours:,.0f}" + (f", and {idle:,.0f} of spare nodes" if request.spares else "")),
    ]


def _idle(request: SubmitRequest) -> str:
    what = f"{request.spares * request.cluster.gpus_per_node:,} GPUs" if request.cluster.gpus_per_node else "nodes"
    return f"{what} that wait for one of the others to fail, {request.spares / request.job_nodes:.1%} of the job"


def _memory(prediction: RunPrediction) -> str:
    total = prediction.memory.total_gib
    if prediction.device_gib is None:
        return f"{total:.1f} GiB"
    return f"{total:.1f} of {prediction.device_gib:.0f} GiB"


def show(request: SubmitRequest, found: Preflight, *, avoid: ToAvoid) -> None:
    """Prints findings, configuration, script and figures: what has to be acted on is read first.

    Args:
        request: what would be submitted.
        found: by the checks.
        avoid: nodes in quarantine.
    """
    count = len(found.findings)
    print(f"# preflight: {count} finding{'' if count == 1 else 's'}")
    for finding in found.findings:
        print(finding)
    print()
    print(f"# {request.run_dir}/run.yaml")
    print(to_yaml(request.config))
    if request.cluster.scheduler == "slurm":
        print("# script for sbatch")
        print(*(f"# {note}" for note in avoid.notes), script(request, exclude=avoid.nodes), sep="\n")
    else:
        print("# submitit's local executor would start the run on this machine\n")
    if found.prediction is not None:
        print("# predicted (megatron_qwen/estimate; not measured)")
        for name, value in figures(request, found.prediction):
            print(f"{name:<38}{value}")
        print("\n# performance.preset would choose")
        for choice in found.prediction.choices:
            if not choice.forced:
                print(choice)


def as_json(request: SubmitRequest, found: Preflight, *, avoid: ToAvoid) -> str:
    """The same for programs."""
    content: dict[str, Any] = {
        "name": request.name,
        "run_dir": str(request.run_dir),
        "nodes": request.nodes,
        "spares": request.spares,
        "ranks": request.world_size,
        "config": as_dict(request.config),
        "sbatch": script(request, exclude=avoid.nodes) if request.cluster.scheduler == "slurm" else None,
        "findings": [{"severity": item.severity, "text": str(item.problem)} for item in found.findings],
        "predicted": None,
    }
    if (prediction := found.prediction) is not None:
        speed = prediction.speed
        content["predicted"] = {
            "parameters": prediction.parameters.total,
            "active_parameters": prediction.parameters.active,
            "memory_gib": prediction.memory.total_gib,
            "memory_state_gib": prediction.memory.state_gib,
            "device_memory_gib": prediction.device_gib,
            "tokens_per_second": speed.tokens_per_second if speed else None,
            "step_s": speed.step_s if speed else None,
            "hours": prediction.hours,
            "gpu_hours": prediction.gpu_hours,
            "checkpoint_bytes": prediction.checkpoint,
            "tokens": prediction.tokens,
            "choices": {
                choice.field: {"value": choice.value, "reason": choice.reason} for choice in prediction.choices
            },
        }
    return json.dumps(content, indent=2)
