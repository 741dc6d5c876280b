"""Which settings of ``objective`` are legal."""

from collections.abc import Iterator

from megatron_qwen.config.lora import EMBEDDING, HEAD
from megatron_qwen.config.objective import ObjectiveConfig
from megatron_qwen.config.run import RunConfig
from megatron_qwen.errors import Problem


def objective_problems(config: RunConfig) -> Iterator[Problem]:
    """What is wrong with the section."""
    yield from _unused(config)
    described = config.objective.token_descriptions
    if not described:
        return
    where, value = "objective.token_descriptions", ", ".join(described)
    if config.objective.kind == "pretrain":
        yield Problem(where, value, "is for fine-tuning (objective.kind=sft); omit it.")
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


def _unused(config: RunConfig) -> Iterator[Problem]:
    """Settings of an objective that is not trained would be taken for its settings."""
    objective, default = config.objective, ObjectiveConfig()
    of = {"dpo_loss": ("dpo",), "label_smoothing": ("dpo",), "nll_coeff": ("dpo",), "beta": ("dpo", "orpo")}
    for name, kinds in of.items():
        if objective.kind not in kinds and (value := getattr(objective, name)) != getattr(default, name):
            yield Problem(f"objective.{name}", value, f"is for objective.kind={' or '.join(kinds)}; omit it.")
    if objective.of_pairs and objective.average != default.average:
        fix = f"is for objective.kind=sft: {objective.kind} is a mean over pairs."
        yield Problem("objective.average", objective.average, fix)
    if objective.label_smoothing and objective.dpo_loss in ("hinge", "ipo"):
        fix = f"has no effect on dpo_loss={objective.dpo_loss}; set it to 0."
        yield Problem("objective.label_smoothing", objective.label_smoothing, fix)
