"""Load-balancing loss and the busiest expert's share, for a mixture-of-experts (MoE) model."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter

from megatron_qwen.training.callbacks.base import Callback, TrainerInterface
from megatron_qwen.training.step_record import StepRecord

_TRACKED = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


class ExpertLoad(Callback):
    """Counts how many tokens the routers send to each expert.

    ``load_balancing_loss`` is megatron-core's auxiliary loss, averaged over layers and micro-batches, without its
    coefficient: 1 is perfect balance; the worst value is experts / top-k, when all tokens go to the same experts.
    ``busiest_expert_share`` is the largest share of a layer's token slots that one expert took; 1 / experts is
    perfect balance.
    """

    def __init__(self) -> None:
        self._counts: dict[int, torch.Tensor] = {}

    def before_training(self, trainer: TrainerInterface) -> None:
        """Hooks every router of this rank, and clears megatron-core's global tracker of earlier counts."""
        get_moe_metrics_tracker().clear()
        for chunk in trainer.components.model.modules:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.register_forward_hook(self._count)

    def _count(self, router: Any, inputs: tuple[Any, ...], outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        if not router.training:
            return
        chosen = outputs[1].detach()
        if len(inputs) > 1 and inputs[1] is not None:  # the mask of padding, [s, b]
            chosen = chosen & ~inputs[1].reshape(-1, 1)
        chosen = chosen.sum(dim=0)
        layer = int(router.layer_number) - 1
        self._counts[layer] = self._counts[layer] + chosen if layer in self._counts else chosen

    def before_rerun(self) -> None:
        """Forgets the passes before: the step counts as the one that its update is made from."""
        self._counts.clear()

    def after_step(self, trainer: TrainerInterface, record: StepRecord) -> None:
        """Adds both figures to the record."""
        model = trainer.components.config.model
        assert model.num_moe_experts is not None
        counts = torch.zeros(
            model.num_layers, model.num_moe_experts, dtype=torch.float64, device=trainer.components.batch_slice.device
        )
        for layer, chosen in self._counts.items():
            counts[layer] += chosen
        self._counts.clear()
        dist.all_reduce(counts)
        shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
        record.extra["busiest_expert_share"] = float(shares.max())
        record.extra["load_balancing_loss"] = self._balancing_loss(trainer, record)

    def _balancing_loss(self, trainer: TrainerInterface, record: StepRecord) -> float | None:
        model, batch_slice = trainer.components.config.model, trainer.components.batch_slice
        if not model.moe_aux_loss_coeff or model.moe_router_load_balancing_type == "none":
            return None
        name = _TRACKED[model.moe_router_load_balancing_type]
        # A data stage may set its own micro_batch_size, so the step's configuration counts, not the run's.
        micro_batches = record.global_batch_size // (record.config.training.micro_batch_size * batch_slice.dp_size)
        totals: dict[str, torch.Tensor] = {}
        get_moe_metrics_tracker().report(
            1.0 / micro_batches,
            record.iteration,
            force_initialize=True,
            track_names=[name],
            num_layers=model.num_layers,
            moe_layer_freq=1,
            total_loss_dict=totals,
            pg_collection=trainer.components.groups,
        )
        return float(totals[name])
