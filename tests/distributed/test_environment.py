"""What is compared at a resume, and what is said of it."""

import os

from megatron_qwen.distributed import environment
from megatron_qwen.distributed.environment import EnvironmentChange, changes, differing_nodes, environment_of_attempt


def test_what_is_recorded(pool):
    (found,) = pool[1].run(_recorded)
    always = {"code", "python", "torch", "cpu instructions", "device", "kernel", "libc", "processor", "ranks"}
    assert always <= {*found["facts"]}
    assert found["facts"]["ranks"] == "1"
    assert found["facts"]["kernel"] == os.uname().release
    assert found["packages"]["torch"] == found["facts"]["torch"].partition("+")[0]


def _recorded():
    return environment_of_attempt()


def test_changes_and_what_they_mean():
    before = {"facts": {"torch": "2.13", "kernel": "6.1", "device": "H100"}, "packages": {"numpy": "2.5", "rich": "1"}}
    now = {"facts": {"torch": "2.13", "kernel": "6.2", "device": "H200"}, "packages": {"numpy": "2.6", "apex": "1"}}
    assert [(str(one), one.may_change_values) for one in changes(before, now)] == [
        ("device H100 -> H200", True),
        ("kernel 6.1 -> 6.2", False),
        ("apex absent -> 1", True),
        ("numpy 2.5 -> 2.6", True),
        ("rich 1 -> absent", False),
    ]
    assert changes(before, before) == []
    assert changes({}, now), "an empty record differs"


def test_which_changes_may_change_values():
    for name in ("torch", "megatron-core", "transformer-engine-cu13", "nvidia-cublas", "triton", "flash-attn-3"):
        assert EnvironmentChange(f"package {name}", "1", "2").may_change_values, name
    for name in ("rich", "wandb", "torchvision", "tensorboard", "numpydoc"):
        assert not EnvironmentChange(f"package {name}", "1", "2").may_change_values, name
    for name in ("code", "cudnn", "nccl", "threads", "ranks", "libc", "processor", "$NCCL_ALGO"):
        assert EnvironmentChange(name, "1", "2").may_change_values, name


def test_a_node_that_computes_with_something_else_is_named(pool):
    assert pool[2].run(_odd_node, False) == [[], []]
    assert pool[2].run(_odd_node, True) == [["odd: kernel 6.1 -> 6.2"], []]


def _odd_node(odd):
    import torch.distributed as dist

    rank = dist.get_rank()
    here = {"SLURMD_NODENAME": "odd" if rank else "even", "LOCAL_RANK": "0"}
    kept, before = environment.environment, {name: os.environ.get(name) for name in here}
    environment.environment = lambda: {"facts": {"kernel": "6.2" if odd and rank else "6.1"}, "packages": {}}
    os.environ.update(here)
    try:
        return differing_nodes()
    finally:
        environment.environment = kept
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def test_the_driver_is_read_from_the_kernel(tmp_path, monkeypatch):
    path = tmp_path / "version"
    monkeypatch.setattr(environment, "_DRIVER", path)
    assert environment._driver() == ""
    for driver, line in (
        ("535.183.01", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024"),
        (
            "570.124.06",
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build  (root@host)",
        ),
    ):
        path.write_text(f"{line}\nGCC version: gcc version 12.2.0\n")
        assert environment._driver() == driver
