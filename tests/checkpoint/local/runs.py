"""Runs on ranks of a pool that take themselves for ranks of several nodes, and fail at a step."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_qwen.config.run import RunConfig
from tests.distributed import jobs


class Fault(Exception):
    """What ends an attempt on all ranks, as a lost peer does."""


def attempt(config: RunConfig, run_dir: Path, nodes: Sequence[str], fail_after: int | None = None) -> dict[str, Any]:
    """One attempt; it fails after a step, when every callback has seen that.

    Returns:
        What was logged, and the exit code, None after the fault.
    """
    import logging

    import torch.distributed as dist

    from megatron_qwen.training import attempt as module
    from megatron_qwen.training.callbacks.base import Callback

    class Failing(Callback):
        def after_step(self, trainer: Any, record: Any) -> None:
            if record.iteration == fail_after:
                raise Fault

    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_qwen")
    plain, level = module.build_callbacks, logger.level
    os.environ["SLURMD_NODENAME"] = nodes[dist.get_rank()]
    module.build_callbacks = lambda *words, **named: [*plain(*words, **named), Failing()]
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        return {"code": jobs.attempt(config, run_dir), "log": heard}
    except Fault:
        return {"code": None, "log": heard}
    finally:
        module.build_callbacks = plain
        del os.environ["SLURMD_NODENAME"]
        logger.removeHandler(handler)
        logger.setLevel(level)
