"""Weights that are used without calling the module that holds them."""

import torch


def arrived_weight(module: torch.nn.Module) -> torch.nn.Parameter:
    """The module's weight, once its data-parallel gather has ended.

    With overlap_param_gather the core's DistributedDataParallel waits for a bucket in a hook before the forward pass of
    each module that has a parameter in it. Who takes a weight out of a module must run the hooks, or computes with
    what the last step left there.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
    weight = module.weight
    assert isinstance(weight, torch.nn.Parameter)
    return weight
