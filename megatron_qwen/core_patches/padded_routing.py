"""Load-balancing losses weigh a micro-batch by the tokens that it holds, however many of its positions are padding.

Replaces: ``get_tokens_per_expert_and_token_count`` of ``megatron.core.transformer.moe.router``, and
    ``TopKRouter._apply_global_aux_loss``, where there is a mask of padding. Without one nothing changes.
Needed: with megatron-core 0.19.2, whose function returns as the tokens of this rank those of its whole TP-CP group,
    because the sum over the group is made in place. The gradient of the loss, which is multiplied by the group's size
    afterwards, is then too large by that factor. The global loss divides the experts' mean counts of all micro-batches
    so far by the tokens of the present one, which is the same number only if no micro-batch has padding.
When: after megatron.core is imported, on every process.
Can go: when ``local_num_tokens`` is taken before the reduction, and the global loss divides by the mean number of
    tokens. Then tests/distributed/test_padding.py passes without it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_qwen.core_patches.replacement import wrap


def apply() -> None:
    """Wraps both, once."""
    from megatron.core.transformer.moe import router

    wrap(router, "get_tokens_per_expert_and_token_count", _counts)
    wrap(router.TopKRouter, "_apply_global_aux_loss", _global_loss)


def _counts(plain: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    @functools.wraps(plain)
    def counts(
        routing_map: torch.Tensor, reduce_group: Any, topk: int | None = None, with_padding_mask: bool = False
    ) -> tuple[Any, ...]:
        if not with_padding_mask:
            return plain(routing_map=routing_map, reduce_group=reduce_group, topk=topk)
        assert topk is not None
        per_expert = _summed(routing_map.sum(dim=0), reduce_group)
        tokens = (per_expert.sum() / topk).clamp(min=1)
        # Its caller multiplies by the size of the group again.
        return per_expert, tokens / reduce_group.size(), tokens

    return counts


def _global_loss(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(plain)
    def apply_global_aux_loss(
        self: Any,
        probs: torch.Tensor,
        scores_for_aux_loss: torch.Tensor,
        routing_map: torch.Tensor,
        with_padding_mask: bool = False,
    ) -> torch.Tensor:
        coefficient = self.get_aux_loss_coeff("global_aux_loss")
        if not with_padding_mask or coefficient == 0:
            return plain(self, probs, scores_for_aux_loss, routing_map)
        from megatron.core.transformer.moe import router

        per_expert = _summed(routing_map.sum(dim=0), self.tp_dp_cp_group)
        slots = per_expert.sum().clamp(min=1)
        self.global_tokens_per_expert += per_expert
        self.ga_steps += 1
        # The experts' shares of all micro-batches so far, as counts among as many slots as this one has.
        counts = self.global_tokens_per_expert * (slots / self.global_tokens_per_expert.sum().clamp(min=1))
        loss = router.switch_load_balancing_loss_func(
            probs=scores_for_aux_loss,
            tokens_per_expert=counts,
            total_num_tokens=slots / self.topk,
            topk=self.topk,
            num_experts=self.config.num_moe_experts,
            moe_aux_loss_coeff=coefficient,
            fused=self.config.moe_router_fusion,
        )
        weight: torch.Tensor = self.attach_and_log_load_balancing_loss(
            probs,
            coefficient,
            loss,
            "global_load_balancing_loss",
            self.tp_dp_cp_group,
            needs_dp_avg=False,
            # A token weighs the same wherever it lies. Over DP ranks the loss is a sum of shares, which the division by
            # all tokens makes a mean again, as without padding.
            valid_token_count=slots / self.topk / self.tp_dp_cp_group.size(),
        )
        return weight

    return apply_global_aux_loss


def _summed(counts: torch.Tensor, group: Any) -> torch.Tensor:
    if group.size() > 1:
        torch.distributed.all_reduce(counts, group=group)
    return counts
