"""Access to weights that are used without calling their module."""

import torch


def arrive(module: torch.nn.Module) -> None:
    """Waits for the data-parallel all-gather of a module's own parameters.

    With overlap_param_gather, megatron-core's DistributedDataParallel waits for the all-gather of a bucket in a forward
    pre-hook of each module with a parameter in it. Code that reads a weight without calling the module must run these
    hooks; otherwise it computes with the weights of the previous step.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())


def arrived_weight(module: torch.nn.Module) -> torch.nn.Parameter:
    """The module's weight, after its data-parallel all-gather has finished."""
    arrive(module)
    weight = module.weight
    assert isinstance(weight, torch.nn.Parameter)
    return weight
