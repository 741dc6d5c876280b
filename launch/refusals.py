"""What Slurm's words say of a submission that failed: whether the nodes were the reason, and whether it has the job."""

import shlex
from collections.abc import Iterable
from pathlib import Path

from megatron_qwen.errors import Problem, UserError
from megatron_qwen.slurm import SlurmError

# The texts of slurm_errno.c of Slurm 22 to 25, and the reason that sbatch gives for a job that no node can take.
_OF_NODES = (
    "node configuration is not available",
    "node count specification invalid",
    "required node not available",
    "nodes required for job are",
)
# Of connections (slurm_errno.c, the C library) and of programs that gave up: slurmctld may have taken the job before
# its answer was lost. The last is submitit's, of an answer without a number.
_UNKNOWN = (
    "timed out",
    "unable to contact",
    "zero bytes",
    "connection",
    "communication",
    "did not answer",
    "broken pipe",
    "make sense of sbatch output",
)


def refuses_nodes(error: UserError) -> bool:
    """Whether sbatch refused the job for want of nodes, so that it may take it with fewer of them excluded."""
    return not may_have_taken(error) and _names(error, _OF_NODES)


def may_have_taken(error: UserError) -> bool:
    """Whether the job may exist all the same: another submission of it would be one too many."""
    return _names(error, _UNKNOWN)


def not_known(error: UserError, run_dirs: Iterable[Path]) -> SlurmError:
    """The same error with what to do, where nobody knows whether Slurm has the jobs of these runs."""
    where = shlex.join(map(str, run_dirs))
    said = "; ".join(map(str, error.problems)) or str(error)
    fix = f"{said}. Whether Slurm has the job is not known; `mq launch status {where}` looks for it."
    return SlurmError(Problem("submission", None, fix))


def _names(error: UserError, signs: Iterable[str]) -> bool:
    said = str(error).lower()
    return any(sign in said for sign in signs)
