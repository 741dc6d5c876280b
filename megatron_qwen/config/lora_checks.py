"""Which settings of ``lora`` are legal."""

from collections.abc import Iterator

from megatron_qwen.config.lora import EMBEDDING, HEAD, matches, possible_targets, targets
from megatron_qwen.config.run import RunConfig
from megatron_qwen.errors import Problem


def lora_problems(config: RunConfig) -> Iterator[Problem]:
    """What is wrong with the section."""
    lora, model, parallel = config.lora, config.model, config.parallel
    if lora.rank is None:
        return
    possible = possible_targets(model)
    for pattern in lora.target_modules:
        if not any(matches(one, pattern) for one in possible):
            fix = f"matches nothing of this model; it has {', '.join(one.name for one in possible)}."
            if model.share_embeddings_and_output_weights and pattern in (EMBEDDING, HEAD):
                fix = "is one matrix with the other, tied; train it whole instead: lora.modules_to_save=[embed_tokens]."
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
    if parallel.pipeline_model_parallel_size > 1 and chosen and not any(one.per_layer for one in chosen):
        fix = "names no module of a layer, so that pipeline stages in the middle would have nothing to train; add one."
        yield Problem("lora.target_modules", ", ".join(lora.target_modules), fix)
    for name in {one.name for one in chosen} & set(lora.modules_to_save):
        yield Problem("lora.modules_to_save", name, "has an adapter by lora.target_modules; name it in one of them.")
    if any(layer.per_expert for layer in chosen) and parallel.expert_tensor_size > 1:
        fix = "cannot split experts with adapters; set parallel.expert_tensor_parallel_size=1."
        yield Problem("parallel.expert_tensor_parallel_size", parallel.expert_tensor_size, fix)
    if config.performance.moe_shared_expert_overlap and any(".shared_expert." in layer.name for layer in chosen):
        fix = "calls the shared expert in pieces, past its adapters; set it to false."
        yield Problem("performance.moe_shared_expert_overlap", "true", fix)
    if config.performance.cuda_graph_impl == "local":
        yield Problem("performance.cuda_graph_impl", "local", "was never run with adapters; set it to none.")
    if config.performance.fp8_param_gather:
        fix = "is for weights that are trained; set it to false: with LoRA they are not."
        yield Problem("performance.fp8_param_gather", "true", fix)
