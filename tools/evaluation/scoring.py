"""Runs tasks on a model, and what is said of their results."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_qwen.inference.answered import AnsweredLog
from megatron_qwen.inference.together import Together
from tools.generation.loaded import LoadedModel
from tools.generation.progress import RequestProgress

if TYPE_CHECKING:
    from megatron_qwen.evaluation.harness import ChatFormat
    from megatron_qwen.evaluation.tasks import Prepared

ANSWERED, RESULTS, SAMPLES = "answered.jsonl", "results.json", "samples"
# Metrics whose error the harness finds by drawing samples anew; its default of 100,000 takes minutes.
_HARNESS_BOOTSTRAP = 1000


@dataclass(frozen=True)
class EvalOptions:
    """What is evaluated.

    Args:
        limit: items of a task; None takes all.
        shots: examples before each item; None leaves that to the task.
        chat: prompts as turns of the tokenizer's chat template.
        system: text of the first turn; None is none.
        output: directory of what is kept; None keeps nothing.
    """

    limit: int | None = None
    shots: int | None = None
    chat: bool = False
    system: str | None = None
    output: Path | None = None


def evaluate(model: LoadedModel, together: Together, prepared: "Prepared", options: EvalOptions) -> dict[str, Any]:
    """Runs the tasks, on rank 0; the others follow.

    Returns:
        The harness's results, with ``mq`` beside them: the model, and intervals.

    Raises:
        ConfigError: a task that cannot be run.
    """
    from lm_eval import simple_evaluate

    from megatron_qwen.evaluation import gold
    from megatron_qwen.evaluation.harness import HarnessModel
    from tools.evaluation.intervals import intervals

    began = time.monotonic()
    answered = AnsweredLog(options.output / ANSWERED if options.output else None, model.identity())
    before, progress = len(answered), RequestProgress("requests of one kind")
    adapter = HarnessModel(
        together,
        model.tokenizer,
        ends=model.chat_ends if options.chat else model.ends,
        end=model.end,
        answered=answered,
        chat=_chat_format(model) if options.chat else None,
        progress=progress,
    )
    found: dict[str, Any] = simple_evaluate(
        model=adapter,
        tasks=list(prepared.tasks),
        task_manager=prepared.manager,
        num_fewshot=options.shots,
        limit=options.limit,
        apply_chat_template=options.chat,
        system_instruction=options.system,
        bootstrap_iters=_HARNESS_BOOTSTRAP,
        confirm_run_unsafe_code=True,  # tasks that would run it here were refused when they were loaded
    )
    gold.add_to(found, prepared.loaded(), adapter, chat=options.chat)
    progress.close()
    found["mq"] = {
        "model": model.identity(),
        "intervals": intervals(found),
        "seconds": round(time.monotonic() - began, 1),
        "answered_before": before,
    }
    if options.output is not None:
        write(found, options.output)
        answered.remove()
    return found


def _chat_format(model: LoadedModel) -> "ChatFormat":
    from megatron_qwen.evaluation.harness import ChatFormat
    from tools.generation.chat import chat_template

    found = chat_template(model.source.tokenizer)

    def render(turns: list[dict[str, str]], begin_answer: bool) -> str:
        return found.render(turns, begin_answer=begin_answer)

    return ChatFormat(render, found.source, found.name)


def write(found: dict[str, Any], output: Path) -> None:
    """Writes ``results.json``, and the items of each task as JSON lines."""
    from megatron_qwen.files import atomic_write

    folder = output / SAMPLES
    folder.mkdir(parents=True, exist_ok=True)
    for task, samples in found["samples"].items():
        lines = "".join(_json(sample) + "\n" for sample in samples)
        atomic_write(folder / f"{task}.jsonl", lines)
    rest = {key: value for key, value in found.items() if key != "samples"}
    atomic_write(output / RESULTS, _json(rest, indent=2) + "\n")


def _json(value: Any, *, indent: int | None = None) -> str:
    from lm_eval.utils import handle_non_serializable

    return json.dumps(value, indent=indent, ensure_ascii=False, default=handle_non_serializable)
