"""The section ``evaluation`` of a configuration."""

from dataclasses import dataclass

from megatron_qwen.config.fields import setting


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Tasks that the model is scored in, and prompts that it answers, while it trains (docs/evaluate.md)."""

    tasks: tuple[str, ...] = setting(
        (), doc="Tasks and groups of lm-evaluation-harness; empty is none. Needs data.tokenizer and the extra eval."
    )
    task_dir: str | None = setting(None, doc="Directory with task files (YAML) beside the harness's own.")
    prompts: tuple[str, ...] = setting(
        (),
        doc="Texts that the model goes on with, at the same intervals, in samples.jsonl; in sft turns of a user. Needs "
        "data.tokenizer.",
    )
    interval: int = setting(
        1000,
        doc="Iterations between evaluations; there is one after the last step, too. 0 is that one alone.",
        minimum=0,
    )
    examples: int | None = setting(None, doc="Documents of each task; null is all of them.", minimum=1)
    shots: int | None = setting(
        None, doc="Examples in front of each document; null is each task's own number.", minimum=0
    )
