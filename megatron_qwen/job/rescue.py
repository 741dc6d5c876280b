"""The last line of a batch script: requeues the job if its controller has ended without a decision.

python -m megatron_qwen.job.rescue EXIT_CODE

A controller decides what follows an attempt. One that was killed by itself (the kernel's out-of-memory killer, a
person) or that could not continue has decided nothing; the ranks are there still, and save when the job is requeued.
"""

import logging
import os
import sys
from collections.abc import Mapping

from megatron_qwen.errors import EXIT_CONFIG, EXIT_DO_NOT_REQUEUE, UserError
from megatron_qwen.job.allocation import Ending
from megatron_qwen.job.settings import JobSettings
from megatron_qwen.job.slurm_allocation import SlurmAllocation
from megatron_qwen.job.verdict import EXIT_INTERRUPTED
from megatron_qwen.log_lines import LogFormatter
from megatron_qwen.resilience.rules import EXIT_TERMINATED

log = logging.getLogger(__name__)
# Of a controller that has decided, or that a person has ended. With any other Slurm is asked whether it has requeued.
_DECIDED = (0, EXIT_CONFIG, EXIT_DO_NOT_REQUEUE, EXIT_INTERRUPTED, EXIT_TERMINATED)
# Slurm counts all starts of a job, those after preemptions and time limits too: more than a run has, and an end where a
# controller is killed at every start. Chosen by hand, as the pause is.
_MOST_STARTS, _DELAY_S = 1000, 120.0


def rescue(code: int, environ: Mapping[str, str] = os.environ) -> bool:
    """Requeues this job, unless that has been decided already; returns whether it did."""
    if code in _DECIDED or "SLURM_JOB_ID" not in environ:
        return False
    allocation = SlurmAllocation(JobSettings(scheduler="slurm", signal_delay_s=0), environ)
    if allocation.restarts >= _MOST_STARTS or allocation.ending() is not Ending.NOTHING:
        return False
    log.warning("the controller ended with code %d and decided nothing: requeued", code)
    try:
        allocation.requeue(delay_s=_DELAY_S)
    except UserError as error:
        log.error("%s", error.render())
        return False
    return True


if __name__ == "__main__":
    said = logging.StreamHandler()
    said.setFormatter(LogFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[said])
    rescue(int(sys.argv[1]))
