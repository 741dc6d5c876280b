"""What of a machine decides which fast paths a run can take."""

from dataclasses import dataclass

from megatron_qwen.config.run import RunConfig
from megatron_qwen.estimate.hardware import known


@dataclass(frozen=True)
class Machine:
    """A node as a rank sees it.

    Args:
        backend: ``te`` or ``torch``, as it was chosen.
        gpu: whether ranks compute on GPUs.
        memory_gib: of a device; None where it is not known, and on a CPU, whose memory nobody hands out by rank.
        libraries: optional packages that import.
        compiler: whether there is a C++ compiler.
        threads: CPU threads of a rank.
    """

    backend: str
    gpu: bool
    memory_gib: float | None = None
    libraries: frozenset[str] = frozenset()
    compiler: bool = False
    threads: int = 1


def expected(config: RunConfig, *, gpu: str | None) -> Machine:
    """The machine that a run will meet on a cluster, as far as the cluster's file says.

    Args:
        config: the run.
        gpu: the cluster's GPU by its name; None is a cluster without.
    """
    if gpu is None:
        return Machine("torch", gpu=False)
    plain = config.precision.backend == "torch" or config.precision.emulate_fp8
    device = known(gpu)
    return Machine("torch" if plain else "te", gpu=True, memory_gib=device.memory_gib if device else None)
