"""Which settings of ``objective`` are legal."""

from collections.abc import Iterator

from megatron_qwen.config.lora import EMBEDDING, HEAD
from megatron_qwen.config.run import RunConfig
from megatron_qwen.errors import Problem


def objective_problems(config: RunConfig) -> Iterator[Problem]:
    """What is wrong with the section."""
    described = config.objective.token_descriptions
    if not described:
        return
    where, value = "objective.token_descriptions", ", ".join(described)
    if config.objective.kind != "sft":
        yield Problem(where, value, "is for objective.kind=sft; omit it.")
    if config.checkpoint.load is None:
        yield Problem(where, value, "needs checkpoint.load, the model whose rows describe the tokens.")
    tied = config.model.share_embeddings_and_output_weights
    needed = {EMBEDDING} if tied else {EMBEDDING, HEAD}
    if config.lora.rank is not None and not needed <= set(config.lora.modules_to_save):
        yield Problem(
            where, value, f"changes rows that LoRA freezes; add {', '.join(sorted(needed))} to lora.modules_to_save."
        )
    if config.data.tokenizer is None:
        yield Problem(where, value, "needs data.tokenizer, which says what the words' rows are.")
