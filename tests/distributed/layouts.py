"""The layouts that tests put a model under: name -> (ranks, changes to the configuration)."""

from typing import Any

TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {"virtual_pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}

DENSE: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, TP2),
    "TP2+SP": (2, TP2 | SP),
    "PP2": (2, PP2),
    "PP2xVPP2": (2, PP2 | VPP2),
    "PP2 uneven": (2, PP2 | {"num_layers_in_first_pipeline_stage": 1}),
    "CP2": (2, CP2),
    "DP2": (2, {}),
    "TP2+SPxPP2": (4, TP2 | SP | PP2),
    "TP2xCP2": (4, TP2 | SP | CP2),
    "DP2 overlapped": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "PP2xDP2 overlapped": (4, PP2 | {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "full recompute": (1, {"recompute": "full"}),
    "selective recompute": (1, {"recompute": "selective"}),
    "TP2+SP full recompute": (2, TP2 | SP | {"recompute": "full"}),
}

# megatron-core's rule: tensor parallelism in an MoE model requires sequence parallelism.
MOE: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2+SP": (2, TP2 | SP),
    "PP2": (2, PP2),
    "PP2xVPP2": (2, PP2 | VPP2),
    "CP2": (2, CP2),
    "DP2": (2, {}),
    "EP2": (2, EP2),
    "TP2+SPxPP2": (4, TP2 | SP | PP2),
    "EP2xTP2 ETP1": (2, TP2 | SP | EP2 | {"expert_tensor_parallel_size": 1}),
    "EP2xTP2 ETP2": (4, TP2 | SP | EP2 | {"expert_tensor_parallel_size": 2}),
    "PP2xEP2": (4, PP2 | EP2),
    "full recompute": (1, {"recompute": "full"}),
    "EP2 full recompute": (2, EP2 | {"recompute": "full"}),
}
