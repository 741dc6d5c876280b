"""The optimizer's state is gathered into the places that parameters count from; several ranks: tests/distributed."""

import inspect
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

KEYS = ("param", "exp_avg", "exp_avg_sq")
# Two buckets of two parameters, the first padded from 5 to 8 elements: [begin, end) in the buffer.
PLACES = {"a": (0, 2), "b": (2, 5), "c": (8, 11), "d": (11, 12)}
BUCKETS = ((0, 8, 5, ("a", "b")), (8, 4, 4, ("c", "d")))


def _optimizer() -> Any:
    """What both functions read of a DistributedOptimizer of one rank; state is the place itself, by kind."""
    values = {
        (name, key): torch.arange(begin, end, dtype=torch.float32) + 100 * index
        for name, (begin, end) in PLACES.items()
        for index, key in enumerate(KEYS)
    }
    buckets, ranges = [], []
    for offset, size, unpadded, names in BUCKETS:
        buckets.append(SimpleNamespace(offset=offset, grad_data=torch.zeros(size), numel_unpadded=unpadded))
        spans = {name: SimpleNamespace(start=PLACES[name][0] - offset, end=PLACES[name][1] - offset) for name in names}
        ranges.append({"param_map": {name: {"gbuf_local": span} for name, span in spans.items()}})
    buffer = SimpleNamespace(numel=12, numel_unpadded=9, buckets=buckets)
    return SimpleNamespace(
        data_parallel_group_gloo=dist.group.WORLD,
        optimizer_state_keys=KEYS[1:],
        buffers=[buffer],
        gbuf_ranges=[{"fp32": ranges}],
        _get_main_param_and_optimizer_states=lambda name: {key: values[name, key] for key in KEYS},
    )


def observe(prepared: bool) -> dict[str, Any]:
    """By parameter, its elements where its place says; and how much room there is for a load."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    gather, optimizer = DistributedOptimizer.get_parameter_state_dp_zero, _optimizer()
    state = gather(optimizer)[0]["fp32"]
    room = gather(optimizer, empty_data=True, return_on_all_ranks=True)[0]["fp32"]
    cuts = inspect.getsource(DistributedOptimizer.sharded_param_state_fully_reshardable)
    return {
        "counts padding": "world_tensors[state_key][param_world_start:param_world_end]" in cuts,
        "cut": {name: {key: state[key][begin:end].tolist() for key in KEYS} for name, (begin, end) in PLACES.items()},
        "room": [room[key].numel() for key in KEYS],
    }


EXPECTED = {
    name: {key: [float(place + 100 * index) for place in range(begin, end)] for index, key in enumerate(KEYS)}
    for name, (begin, end) in PLACES.items()
}


def test_every_parameter_in_its_place(observed):
    assert observed.prepared == {"counts padding": True, "cut": EXPECTED, "room": [12, 12, 12]}


def test_megatron_core_shifts_what_follows_padding(observed):
    found = observed.plain["cut"]
    assert {name: found[name] for name in ("a", "b")} == {name: EXPECTED[name] for name in ("a", "b")}
    assert found["c"] != EXPECTED["c"]
