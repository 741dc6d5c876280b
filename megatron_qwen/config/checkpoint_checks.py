"""The rules between the fields of the section ``checkpoint``."""

from collections.abc import Iterator

from megatron_qwen.config.run import RunConfig
from megatron_qwen.errors import Problem


def checkpoint_problems(config: RunConfig) -> Iterator[Problem]:
    """What cannot be combined, or cannot be."""
    checkpoint = config.checkpoint
    if checkpoint.load is not None and checkpoint.branch_from is not None:
        fix = "cannot be combined with checkpoint.load; set one of them to null."
        yield Problem("checkpoint.branch_from", checkpoint.branch_from, fix)
    if wrong := [iteration for iteration in checkpoint.save_at if iteration < 1]:
        yield Problem("checkpoint.save_at", wrong, "must hold iterations of at least 1; remove the others.")
    if checkpoint.local_interval is None:
        return
    if not checkpoint.local_dir.startswith(("/", "$")):
        fix = "must be an absolute path on every node, such as /dev/shm or a local disk."
        yield Problem("checkpoint.local_dir", checkpoint.local_dir, fix)
    if config.precision.fp8 and not config.precision.emulate_fp8:
        # Transformer Engine keeps it as pickled bytes of changing length, and a piece holds tensors of fixed shapes.
        fix = f"cannot be combined with precision.fp8={config.precision.fp8}: FP8 scales are not in it; set it to null."
        yield Problem("checkpoint.local_interval", checkpoint.local_interval, fix)
    # What these two keep on the host or in FP8 is not in the shards that a local checkpoint copies.
    for name in ("fp8_param_gather", "optimizer_offload_fraction"):
        if value := getattr(config.performance, name):
            fix = f"cannot be combined with performance.{name}={str(value).lower()}; set one of them to null."
            yield Problem("checkpoint.local_interval", checkpoint.local_interval, fix)
