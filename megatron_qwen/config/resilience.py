"""The section ``resilience`` of a configuration."""

from dataclasses import dataclass
from typing import Literal

from megatron_qwen.config.fields import setting


@dataclass(frozen=True, kw_only=True)
class ResilienceConfig:
    """When a run stops, or is restarted."""

    max_consecutive_skips: int = setting(
        5,
        doc="Consecutive steps with a loss or gradient that is not finite, after which the run stops with exit 17.",
        minimum=1,
    )
    max_restarts_without_progress: int = setting(
        3, doc="Consecutive restarts without a newer checkpoint, after which a job stops restarting the run.", minimum=1
    )
    restart_in_job: bool = setting(
        True,
        doc="Start the ranks again inside the allocation after a fault, on spare nodes if necessary, where the nodes "
        "of the job allow it; false requeues the job.",
    )
    standby_ranks: bool = setting(
        False,
        doc="Keep a second set of ranks on the nodes of a Slurm job, with everything imported, that takes over at a "
        "restart inside the allocation on the same nodes. Needs memory of the nodes, none of the GPUs.",
    )
    hang_timeout_s: float | None = setting(
        None,
        doc="Seconds that a step, a save, a validation or a part of an evaluation may take before a job considers the "
        "run hung, dumps all stacks and restarts. null learns each from the run; a "
        "number must exceed the longest of them.",
        above=0,
    )
    startup_timeout_s: float | None = setting(
        None,
        doc="The same for the set-up with the first step: imports, rendezvous, loading, compilation. null is 1800, "
        "and less where earlier attempts with as many ranks took less.",
        above=0,
    )
    straggler_interval: int = setting(
        5,
        doc="Steps of a window over which ranks compare what each needs by itself, without its waits for the others; "
        "a run of more than 2,500 ranks takes one for 500 ranks at least. 0 turns the comparison off.",
        minimum=0,
    )
    straggler_threshold: float = setting(
        0.7,
        doc="A rank whose speed is below this share of its peers' (ranks of the same pipeline stage) is a straggler.",
        above=0,
        below=1,
    )
    straggler_windows: int = setting(
        3, doc="Windows in a row after which a straggler is named in log, metrics, status and report.", minimum=1
    )
    straggler_action: Literal["log", "requeue"] = setting(
        "log",
        doc="log names stragglers; requeue also saves, ends the attempt and has the job avoid their nodes, at most "
        "once in 6 hours.",
    )
    weight_check_interval: int = setting(
        1,
        doc="Steps between checks of the weights: each rank's are still what its last update wrote, and all "
        "data-parallel replicas are equal. A flipped weight is found in the steps that are checked. They are also "
        "compared before every save. 0 turns all of it off.",
        minimum=0,
    )
    optimizer_check_parts: int = setting(
        16,
        doc="The optimizer state is divided into this many parts, of which each check of the weights covers one: a "
        "flipped bit of it is found with a probability of one in so many. 1 covers all of it every time, 0 nothing.",
        minimum=0,
    )
    spike_threshold: float = setting(
        10.0,
        doc="A step whose loss or gradient norm is so many robust standard deviations above the median of the last "
        "spike_window steps, or not finite, is computed again before the update, to distinguish a hardware fault from "
        "data. 0 turns this off.",
        minimum=0,
    )
    spike_window: int = setting(
        128, doc="Steps whose loss and gradient norm a step is compared with (spike_threshold).", minimum=8
    )
    spike_action: Literal["accept", "skip"] = setting(
        "accept",
        doc="What follows a spike that the data explains: accept takes the update, skip leaves it out, as a step "
        "that is not finite always is.",
    )
    rerun_interval: int = setting(
        0,
        doc="Every so many steps the gradients are computed twice and compared, which finds faults too small for a "
        "spike. Each costs a step; 0 turns it off.",
        minimum=0,
    )
