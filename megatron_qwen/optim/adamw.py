"""AdamW with torch's fused kernel behind the interface of FusedAdam.

Without Transformer Engine and NVIDIA's apex, megatron-core falls back to torch.optim.AdamW. That keeps a step count per
parameter, which breaks loading a fully reshardable checkpoint. This one keeps the step in the parameter group, as
FusedAdam does.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


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


def _scale(chunk_size: int, noop_flag: torch.Tensor, tensors: list[list[torch.Tensor]], factor: float) -> None:
    """Scales gradients for clipping, with apex's signature; one pass, where megatron-core's fallback makes a copy."""
    for source, target in zip(*tensors, strict=True):
        torch.mul(source, factor, out=target)


def install_where_needed() -> str:
    """Makes megatron-core use GroupStepAdamW and ``_scale``, unless it found a fused Adam.

    Returns:
        Name of the optimizer in use, for the log.
    """
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    module: Any = optimizer
    if not module.USING_PYTORCH_OPTIMIZER and module.Adam is not GroupStepAdamW:
        return f"FusedAdam of {module.Adam.__module__.split('.')[0]}"
    distributed: Any = distrib_optimizer
    module.Adam = distributed.Adam = GroupStepAdamW
    module.USING_PYTORCH_OPTIMIZER = False
    clipping: Any = clip_grads
    if clipping.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
        clipping.multi_tensor_scale_impl = _scale
    distributed.HAVE_APEX_OR_TE = True
    return "AdamW with torch's fused kernel (neither Transformer Engine nor NVIDIA apex is installed)"
