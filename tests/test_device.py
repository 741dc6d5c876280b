"""The device layer maps CUDA to the CPU where there is no GPU, and changes nothing where there is one."""

import subprocess
import sys

from tests.conftest import environment

WITH_A_GPU = """
import torch
names = [name for name in dir(torch.cuda) if not name.startswith("__")]
before = {name: getattr(torch.cuda, name) for name in names}
others = (torch.empty, torch.zeros, torch.Tensor.to, torch.Tensor.type, torch.Tensor.cuda, torch.nn.Module.cuda)
collectives = (torch.distributed.all_gather, torch.distributed.reduce_scatter, torch.distributed.all_gather_into_tensor)
torch.cuda.is_available = before["is_available"] = lambda: True
from megatron_qwen import device
device.prepare()
assert all(getattr(torch.cuda, name) is value for name, value in before.items())
assert others == (
    torch.empty, torch.zeros, torch.Tensor.to, torch.Tensor.type, torch.Tensor.cuda, torch.nn.Module.cuda
)
assert collectives == (
    torch.distributed.all_gather, torch.distributed.reduce_scatter, torch.distributed.all_gather_into_tensor
)
assert device.backend() == "nccl"
"""

WITHOUT = """
from megatron_qwen import device
device.prepare()
device.prepare()
import torch
assert device.backend() == "gloo"
assert torch.empty(3, device="cuda").device.type == "cpu"
assert torch.zeros(2).to("cuda:0").device.type == "cpu"
assert torch.zeros(2).to(device=torch.device("cuda"), dtype=torch.float64).dtype == torch.float64
assert torch.zeros(2).cuda().type() == "torch.cuda.FloatTensor"
with torch.cuda.stream(torch.cuda.Stream()):
    torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
torch.cuda.synchronize()
state = torch.cuda.get_rng_state()
first = torch.rand(3)
torch.cuda.set_rng_state(state)
assert torch.equal(first, torch.rand(3))
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
with torch.device("meta"):
    assert torch.empty(2).device.type == "meta"
"""


def run_script(text: str) -> None:
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr


def test_changes_nothing_where_a_gpu_is():
    run_script(WITH_A_GPU)


def test_maps_what_the_core_calls():
    run_script(WITHOUT)  # the environment hides a GPU where there is one
