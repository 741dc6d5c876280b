"""An all-reduce over all nodes of a job, one process per node: python -m megatron_qwen.distributed.loop

The health check runs it on request. It exits with 0 if every node's contribution arrived.
"""

import sys

import torch
import torch.distributed as dist

from megatron_qwen import device, process_settings
from megatron_qwen.distributed.rank import RankInfo, join, leave

# slurm/healthcheck.sh ends this program after 240 s: the error of the collective, which names the cause, comes first.
_TIMEOUT_MINUTES = 3
# 4 MiB in fp32: more than fits one packet of any link. Chosen by hand.
_ELEMENTS = 1 << 20


def main() -> int:
    """Joins, adds up, compares."""
    process_settings.apply(gpu=device.has_cuda())  # no model: it needs nothing of megatron-core
    info = RankInfo.from_environment()
    join(info, timeout_minutes=_TIMEOUT_MINUTES)
    share = torch.full((_ELEMENTS,), float(info.rank + 1), device=device.current())
    dist.all_reduce(share)
    expected = info.world_size * (info.world_size + 1) / 2
    right = bool((share == expected).all())
    if not right:
        print(f"all-reduce over {info.world_size} nodes gave {float(share[0])}, expected {expected}", file=sys.stderr)
    leave()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
