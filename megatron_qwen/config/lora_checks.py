"""Which settings of ``lora`` are legal."""

from collections.abc import Iterator

from megatron_qwen.config.lora import EMBEDDING, HEAD, linear_layers, matches, targets
from megatron_qwen.config.run import RunConfig
from megatron_qwen.errors import Problem


def lora_problems(config: RunConfig) -> Iterator[Problem]:
    """What is wrong with the section."""
    lora, model, parallel = config.lora, config.model, config.parallel
    if lora.rank is None:
        return
    names = [layer.name for layer in linear_layers(model)]
    for pattern in lora.target_modules:
        if not any(matches(name, pattern) for name in names):
            fix = f"matches no linear layer of this model; it has {', '.join(names)}."
            yield Problem("lora.target_modules", pattern, fix)
    if not lora.target_modules:
        yield Problem("lora.target_modules", "[]", "names no layer; set lora.rank=null to train all weights.")
    tied = model.share_embeddings_and_output_weights
    matrices = (EMBEDDING,) if tied else (EMBEDDING, HEAD)
    for name in lora.modules_to_save:
        if name not in matrices:
            why = " (it is embed_tokens: this model's are tied)" if tied and name == HEAD else ""
            yield Problem("lora.modules_to_save", name, f"must be one of {', '.join(matrices)}{why}.")
    if config.checkpoint.load is None and config.checkpoint.branch_from is None:
        fix = "needs checkpoint.load, the model that the adapters are for: untrained weights would stay as they are."
        yield Problem("lora.rank", lora.rank, fix)
    chosen = targets(lora, model)
    if any(layer.per_expert for layer in chosen) and parallel.expert_tensor_size > 1:
        fix = "cannot split experts with adapters; set parallel.expert_tensor_parallel_size=1."
        yield Problem("parallel.expert_tensor_parallel_size", parallel.expert_tensor_size, fix)
    if config.performance.moe_shared_expert_overlap and any(".shared_expert." in layer.name for layer in chosen):
        fix = "calls the shared expert in pieces, past its adapters; set it to false."
        yield Problem("performance.moe_shared_expert_overlap", "true", fix)
    if config.performance.fp8_param_gather:
        fix = "is for weights that are trained; set it to false: with LoRA they are not."
        yield Problem("performance.fp8_param_gather", "true", fix)
