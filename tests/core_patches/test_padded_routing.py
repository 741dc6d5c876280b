"""The global load-balancing loss of micro-batches with unequal padding, against its formula."""

import pytest
import torch

EXPERTS, TOPK, COEFFICIENT = 4, 2, 0.5
# Valid positions of each micro-batch, of which each has 12.
VALID = [12, 3, 7]


def observe(prepared: bool) -> list[tuple[float, float]]:
    """Of each micro-batch: the loss that is logged, and the norm of its gradient by the logits."""
    if not prepared:
        return []
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        moe_router_load_balancing_type="global_aux_loss",
        moe_aux_loss_coeff=COEFFICIENT,
        calculate_per_token_loss=True,
        use_cpu_initialization=True,
    )
    groups = ProcessGroupCollection()
    groups.tp = groups.cp = groups.tp_cp = groups.tp_dp_cp = torch.distributed.group.WORLD
    router = TopKRouter(config, pg_collection=groups)
    router.set_layer_number(1)
    tracker, found = get_moe_metrics_tracker(), []
    for logits, padding in micro_batches():
        tracker.clear()
        probs, _ = router.routing(logits, padding_mask=padding)
        (gradient,) = torch.autograd.grad(0 * probs.sum(), logits)
        logged = tracker.metrics["global_load_balancing_loss"].values
        found.append((float(logged[0]), float(gradient.norm())))
    tracker.clear()
    return found


def micro_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits [12, 1, experts], and which positions are padding [12, 1]."""
    chance = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(12, 1, EXPERTS, generator=chance).add_(torch.arange(EXPERTS) * 0.3).requires_grad_(),
            (torch.arange(12) >= valid)[:, None],
        )
        for valid in VALID
    ]


def test_values(observed):
    """f over all tokens so far, P over those of the micro-batch; its gradient weighs as many tokens as it has."""
    chosen, tokens = torch.zeros(EXPERTS), 0
    assert len(observed.prepared) == len(VALID)
    for (logits, padding), (loss, gradient) in zip(micro_batches(), observed.prepared, strict=True):
        scores = torch.softmax(logits[~padding], dim=-1)
        chosen += torch.zeros_like(scores).scatter(1, scores.topk(TOPK).indices, 1).sum(dim=0)
        tokens += len(scores)
        wanted = EXPERTS * (chosen / (tokens * TOPK) * scores.mean(dim=0)).sum()
        assert loss == pytest.approx(float(wanted), rel=1e-5)
        (by_logits,) = torch.autograd.grad(COEFFICIENT * len(scores) * wanted, logits)
        assert gradient == pytest.approx(float(by_logits.norm()), rel=1e-5)
