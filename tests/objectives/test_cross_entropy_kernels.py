"""The Triton kernels of the loss, run by Triton's interpreter on the CPU: equal to torch's cross-entropy."""

import subprocess
import sys

import pytest

from tests.conftest import environment
from tests.tiers import cases

pytest.importorskip("triton", reason="Triton is not installed")

PROGRAM = """
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_qwen.objectives.cross_entropy_kernels import loss_and_gradient

ROWS, VOCABULARY, PADDED = 7, 19_000, 19_200


def rank(number, ranks, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=ranks)
    torch.manual_seed(0)
    logits = torch.randn(ROWS, PADDED) * 5
    logits[:, VOCABULARY:] = 100.0  # padding must not count
    targets = torch.tensor([0, 9_599, 9_600, VOCABULARY - 1, 17, 12_345, 8_192])
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 1.0, 1.0])

    exact = logits[:, :VOCABULARY].double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    (losses * weights).sum().backward()

    width = PADDED // ranks
    first = number * width
    valid = min(max(VOCABULARY - first, 0), width)
    own = logits[:, first : first + width].contiguous()
    local = targets - first
    mine = (local >= 0) & (local < valid)
    index = local.clamp(0, max(valid - 1, 0))
    seen = loss_and_gradient(
        own, index, mine, weights, valid=valid, group=dist.group.WORLD, with_gradient=True
    )
    torch.testing.assert_close(seen, losses.detach().float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own[:, :valid], exact.grad[:, first : first + valid].float(), rtol=1e-5, atol=1e-7)
    assert not own[:, valid:].any()
    again = logits[:, first : first + width].contiguous()
    kept = again.clone()
    loss_and_gradient(again, index, mine, weights, valid=valid, group=dist.group.WORLD, with_gradient=False)
    assert torch.equal(again, kept)
    dist.destroy_process_group()


if __name__ == "__main__":
    ranks = int(sys.argv[1])
    # Forked: a rank has imported torch and Triton already.
    mp.start_processes(rank, args=(ranks, sys.argv[2]), nprocs=ranks, start_method="fork")
"""


@pytest.mark.parametrize("ranks", cases([2], [1]))
def test_equal_to_torch(ranks, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(ranks), str(tmp_path / "store")]
    settings = environment() | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
