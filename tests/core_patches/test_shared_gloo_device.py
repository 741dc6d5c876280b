"""A process has one thread that waits for sockets, however many groups it is in."""

from pathlib import Path

from megatron_qwen.core_patches import shared_gloo_device


def waiting_threads(groups: int) -> int:
    """Threads of gloo's devices, with as many groups beside the first."""
    import torch
    import torch.distributed as dist

    made = [dist.new_group(backend="gloo") for _ in range(groups)]
    for group in made:
        number = torch.ones(1)
        dist.all_reduce(number, group=group)
        assert number.item() == dist.get_world_size()
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("gloo_tcp_loop")


def test_one_for_all_groups(pool):
    before = pool[2].run(waiting_threads, 0)
    assert pool[2].run(waiting_threads, 5) == before == [1, 1]


def test_a_torch_without_the_function_is_left_alone(monkeypatch):
    """pyproject.toml allows versions that make their groups otherwise."""
    from torch.distributed import distributed_c10d

    monkeypatch.delattr(distributed_c10d, "_create_gloo_process_group")
    shared_gloo_device.apply()
    assert not hasattr(distributed_c10d, "_create_gloo_process_group")
