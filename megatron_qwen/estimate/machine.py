"""The properties of a machine that decide which optimizations a run can use."""

from dataclasses import dataclass

from megatron_qwen.config.run import RunConfig
from megatron_qwen.estimate.hardware import known


@dataclass(frozen=True)
class Machine:
    """A node as a rank sees it.

    Args:
        backend: ``te`` or ``torch``, as it was chosen.
        gpu: whether ranks compute on GPUs.
        memory_gib: of a device; None where it is not known, and on a CPU, whose memory all ranks of the host share.
        libraries: optional packages that can be imported.
        compiler: whether a C++ compiler was found.
        threads: CPU threads per rank.
    """

    backend: str
    gpu: bool
    memory_gib: float | None = None
    libraries: frozenset[str] = frozenset()
    compiler: bool = False
    threads: int = 1


def expected(config: RunConfig, *, gpu: str | None) -> Machine:
    """The machine that a run will start on, as far as the cluster file describes it.

    Args:
        config: the run.
        gpu: name of the cluster's GPU; None for a cluster without GPUs.
    """
    if gpu is None:
        return Machine("torch", gpu=False)
    plain = config.precision.backend == "torch" or config.precision.emulate_fp8
    device = known(gpu)
    return Machine("torch" if plain else "te", gpu=True, memory_gib=device.memory_gib if device else None)
