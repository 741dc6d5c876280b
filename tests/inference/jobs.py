"""What ranks are asked to do with the engine."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_qwen.config.run import RunConfig
from megatron_qwen.inference.request import Answer, Request
from megatron_qwen.inference.scheduler import Limits


def stage_of(config: RunConfig, longest: int) -> Any:
    """This rank's part of a model with the weights that training begins with, the same under every layout."""
    import torch.distributed as dist

    from megatron_qwen import device
    from megatron_qwen.distributed import groups as process_groups
    from megatron_qwen.estimate.choices import choose
    from megatron_qwen.estimate.machine import Machine
    from megatron_qwen.inference.loading import inference_config
    from megatron_qwen.inference.stage import Stage
    from megatron_qwen.models.backend import choose as choose_backend
    from megatron_qwen.models.build import bare_chunk
    from megatron_qwen.models.initialise import initialise
    from megatron_qwen.models.torch_backend.process_kernels import PROCESS_KERNELS

    PROCESS_KERNELS.use(None)  # a rank of a pool may have trained with compiled ones, whose bits are others
    config = inference_config(config)
    groups = process_groups.create(config.parallel, seed=config.training.seed)
    backend = choose_backend(config.precision)
    config = choose(config, Machine(backend.name, gpu=False), world_size=dist.get_world_size())[0]
    module = bare_chunk(config, groups, backend).to(device.current())
    initialise([module], config, groups)
    module.eval()
    return Stage(module, config, groups, longest=longest)


def answers(
    config: RunConfig, requests: Sequence[Request], longest: int = 512, blocks: int = 64, limits: Limits | None = None
) -> dict[str, Any]:
    """What an engine answers, by the number of the request."""
    from megatron_qwen.inference.engine import Engine

    engine = Engine(stage_of(config, longest), blocks=blocks, limits=limits)
    found: dict[int, Answer] = {request.number: answer for request, answer in engine.answer(requests)}
    return {"answers": [found[number] for number in sorted(found)], "preempted": engine.preempted}


def whole_texts(config: RunConfig, texts: Sequence[Sequence[int]], longest: int = 512) -> list[list[float]]:
    """Log-probabilities of every token but the first, by one forward pass of the training's modules for each text."""
    from megatron_qwen.models.torch_backend.batch_invariance import BatchInvariant

    stage = stage_of(config, longest)
    found = []
    for text in texts:
        # Sequence parallelism divides a text by its ranks; what comes after a token has no part in it.
        tokens = torch.tensor([[*text, *[0] * (-len(text) % config.parallel.tensor_model_parallel_size)]])
        labels = torch.cat((tokens[:, 1:], tokens[:, :1]), dim=1)

        def log_probs(*, hidden_states: torch.Tensor, labels: torch.Tensor = labels, **_: Any) -> torch.Tensor:
            return stage.head().log_probs(hidden_states, labels)

        with torch.no_grad(), BatchInvariant():
            positions = torch.arange(tokens.shape[1])[None]
            made = stage.module(tokens, positions, None, labels=labels, output_processor=log_probs)
        found.append(made[0, : len(text) - 1].tolist())
    return found


def counted(config: RunConfig, requests: Sequence[Request]) -> int:
    """How many answers there are."""
    from megatron_qwen.inference.engine import Engine

    return len(list(Engine(stage_of(config, 128), blocks=8).answer(requests)))


def asked_of_rank_0(
    config: RunConfig, asked: Sequence[Sequence[Request]], longest: int = 512, blocks: int = 64
) -> list[dict[int, Answer]] | None:
    """What rank 0 gets for several sets of requests, one after the other; None on the other ranks."""
    import torch.distributed as dist

    from megatron_qwen.inference.engine import Engine
    from megatron_qwen.inference.together import Together

    together = Together(Engine(stage_of(config, longest), blocks=blocks))
    if dist.get_rank():
        together.follow()
        return None
    found = [together.answer(requests) for requests in asked]
    together.close()
    return found


def probed(config: RunConfig, longest: int, spoilt: bool) -> float:
    """What the probe finds; ``spoilt`` computes new tokens with weights that a whole text does not see."""
    from megatron_qwen.inference import exactness
    from megatron_qwen.inference.engine import Engine

    stage = stage_of(config, longest)
    if spoilt:
        compute = stage._layers

        def other(*args: Any, **kwargs: Any) -> torch.Tensor:
            found = compute(*args, **kwargs)
            return found * 1.001 if len(found) <= 4 else found

        stage._layers = other
    return exactness.largest_difference(Engine(stage, blocks=8))


def problem(config: RunConfig, request: Request, longest: int, blocks: int) -> str:
    """Why a request cannot be answered."""
    from megatron_qwen.inference.engine import Engine

    return str(Engine(stage_of(config, longest), blocks=blocks).problem(request))
