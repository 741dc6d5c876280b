"""AdamW with torch's fused kernel and one step count a group, where megatron-core would take torch's own.

Replaces: ``Adam`` and ``USING_PYTORCH_OPTIMIZER`` of ``megatron.core.optimizer``, ``Adam`` and ``HAVE_APEX_OR_TE`` of
    its ``distrib_optimizer``, where neither Transformer Engine nor NVIDIA's apex has a fused Adam: the class below has
    FusedAdam's interface, and megatron-core then treats it as FusedAdam.
Needed: with megatron-core 0.19.2. It falls back to torch.optim.AdamW, whose step count per parameter breaks the load of
    a fully reshardable checkpoint; FusedAdam and this one keep the step in the parameter group.
When: after megatron.core is imported, on every process.
Can go: when a fully reshardable checkpoint of torch's AdamW loads.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


def apply() -> None:
    """Puts GroupStepAdamW where megatron-core looks for its Adam, unless a fused one is there."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    module: Any = optimizer
    distributed: Any = distrib_optimizer
    if not module.USING_PYTORCH_OPTIMIZER:  # a fused one, or ours already
        return
    module.Adam = distributed.Adam = GroupStepAdamW
    module.USING_PYTORCH_OPTIMIZER = False
    distributed.HAVE_APEX_OR_TE = True


def adam_in_use() -> str:
    """Which Adam megatron-core takes, for the log."""
    from megatron.core import optimizer

    adam: Any = optimizer.Adam
    if adam is GroupStepAdamW:
        return "AdamW with torch's fused kernel (neither Transformer Engine nor NVIDIA apex is there)"
    return f"FusedAdam of {adam.__module__.split('.')[0]}"


class GroupStepAdamW(torch.optim.Optimizer):
    """Decoupled weight decay Adam (Loshchilov and Hutter, arXiv 1711.05101).

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the first and the second moment.
        eps: epsilon in the denominator.
        weight_decay: decoupled decay.
        adam_w_mode: must be true; accepted because FusedAdam has it.
    """

    # torch wraps these so that its compiler leaves them alone, and the wrapper imports the compiler, which took 0.9 to
    # 1.0 CPU seconds of a rank's start. Nobody compiles this optimizer.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **_: Any,
    ) -> None:
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            group["step"] = int(group.get("step", 0)) + 1
            states = [self._state_of(param) for param in params]
            # The kernel increments the counts itself, so it gets those before this step.
            counts = [torch.tensor(float(group["step"] - 1), device=param.device) for param in params]
            adamw(
                params,
                [param.grad for param in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                counts,
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _state_of(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[param]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        return state
