"""The section ``checkpoint`` of a configuration."""

from dataclasses import dataclass

from megatron_qwen.config.fields import setting


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, which are kept, and how they are loaded."""

    save_interval: int | None = setting(
        500,
        doc="Iterations between checkpoints; 0 saves at the end only; null is chosen during the run, from the measured "
        "time of a save and of a step and the mean time between faults (docs/slurm.md).",
        minimum=0,
    )
    async_save: bool | None = setting(
        None,
        doc="Write checkpoints in the background; training waits only for a copy in host memory. null is chosen by "
        "performance.preset.",
    )
    local_interval: int | None = setting(
        None,
        doc="Iterations between local checkpoints in local_dir, with a copy on another node: a fault then loses at "
        "most so many iterations. null is none.",
        minimum=1,
    )
    local_dir: str = setting(
        "/dev/shm",
        doc="Where local checkpoints go on every node: its memory or a disk of its own. %n is the node's name, $NAME "
        "an environment variable.",
    )
    keep_last: int = setting(3, doc="Number of newest checkpoints to keep.", minimum=1)
    keep_every: int | None = setting(
        None, doc="Keep checkpoints at multiples of this many iterations permanently; null is none.", minimum=1
    )
    save_at: tuple[int, ...] = setting(
        (), doc="Additional iterations after which a checkpoint is written and kept permanently."
    )
    branch_from: str | None = setting(
        None,
        doc="Checkpoint of another run to resume from if the run directory has none: weights, optimizer, iteration, "
        "data position and random states. Schedule and length are those of this run.",
    )
    load: str | None = setting(
        None, doc="Checkpoint to start from if the run directory has none: weights and optimizer, at iteration 0."
    )
    strict: bool = setting(
        False, doc="Refuse to start if the newest checkpoint is damaged, instead of resuming from an older one."
    )
