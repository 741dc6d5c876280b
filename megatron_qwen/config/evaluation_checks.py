"""Which settings of ``evaluation`` are legal."""

from collections.abc import Iterator

from megatron_qwen.config.run import RunConfig
from megatron_qwen.errors import Problem


def evaluation_problems(config: RunConfig) -> Iterator[Problem]:
    """What is wrong with the section."""
    settings = config.evaluation
    if settings.prompts and config.data.tokenizer is None:
        yield Problem("data.tokenizer", "null", "must name the tokenizer of the data: evaluation.prompts are texts.")
    if not settings.tasks:
        if settings.task_dir is not None:
            fix = "has no effect without evaluation.tasks; name the tasks, or omit it."
            yield Problem("evaluation.task_dir", settings.task_dir, fix)
        return
    if config.data.tokenizer is None:
        fix = "must name the tokenizer of the data: evaluation.tasks are texts."
        yield Problem("data.tokenizer", "null", fix)
    for task in sorted({task for task in settings.tasks if settings.tasks.count(task) > 1}):
        yield Problem("evaluation.tasks", task, "is named twice; name each once.")
