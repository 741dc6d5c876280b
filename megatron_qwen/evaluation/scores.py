"""Tasks put to a model again and again, as while it trains: what is scored, and what a record has of it.

Where a run cannot write answers, a task of written ones (GSM8K) is measured by how likely its own are (``gold.py``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lm_eval.evaluator import evaluate

from megatron_qwen.data.tokenizers.named_ids import beginning_of_text, special_ids
from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.evaluation import gold
from megatron_qwen.evaluation.harness import Answering, HarnessModel
from megatron_qwen.evaluation.tasks import Prepared, random_states_kept, set_shots
from megatron_qwen.inference.answered import AnsweredLog
from megatron_qwen.inference.request import Answer, Request


@dataclass
class CountedOnly:
    """Answers nothing: says how much would be asked, and whether it can be.

    Args:
        longest: positions of a text.
        requests: that were asked for.
        tokens: of them.
        cannot_write: as of what will answer.
    """

    longest: int
    requests: int = 0
    tokens: int = 0
    at_a_time: int = field(default=1 << 20)
    cannot_write: str | None = None

    def answer(self, requests: Sequence[Request]) -> Mapping[int, Answer]:
        """Every token is as likely as the next."""
        self.requests += len(requests)
        self.tokens += sum(len(one.prompt) for one in requests)
        return {one.number: Answer(prompt_logprobs=[-1.0], prompt_greedy=[False]) for one in requests}


class Writing(Answering, Protocol):
    """Answers that may be written, too."""

    @property
    def cannot_write(self) -> str | None:
        """Why texts cannot be written; None where they can."""


def scores(
    prepared: Prepared, answering: Writing, tokenizer: Path, *, examples: int | None, shots: int | None
) -> dict[str, float]:
    """Scores of all tasks and groups, as ``TASK/METRIC``; of a filter of the harness ``TASK/METRIC/FILTER``.

    Args:
        prepared: the tasks.
        answering: scores texts, and may write them.
        tokenizer: directory.
        examples: documents of each task; None takes all.
        shots: examples in front of each; None leaves that to each task.

    Raises:
        ConfigError: an answer that is longer than the model's context.
    """
    loaded, library = prepared.loaded(), load_tokenizer(tokenizer)
    for task in loaded["tasks"].values():
        set_shots(task, shots)
    stated, _ = special_ids(tokenizer, below=library.vocab_size)
    ends = tuple(stated) if isinstance(stated, list) else () if stated is None else (stated,)
    model = HarnessModel(
        answering, library, ends=ends, end=beginning_of_text(tokenizer, library), answered=AnsweredLog(None, {})
    )
    scored = {name: task for name, task in loaded["tasks"].items() if _is_asked(task, answering)}
    found: dict[str, float] = {}
    documents: dict[str, list[Mapping[str, Any]]] = {}
    with random_states_kept():
        if scored:
            # The harness draws errors of some metrics with processes of its own (bootstrap_iters), which a rank may
            # not start.
            groups = {name: one for name, one in loaded["groups"].items() if gold.tasks_of(one) <= set(scored)}
            results = evaluate(model, {"tasks": scored, "groups": groups}, limit=examples, bootstrap_iters=0)
            assert results is not None  # this is its only rank
            for name, samples in results["samples"].items():
                if scored[name].OUTPUT_TYPE == "generate_until":
                    documents[name] = list(gold.of_texts(scored[name], model).values())
                else:
                    documents[name] = [gold.of_choices(scored[name], sample) for sample in samples]
            found |= _flat({**results["results"], **results.get("groups", {})})
        for name, task in loaded["tasks"].items():
            if name not in scored:
                task.build_all_requests(limit=examples)
                documents[name] = list(gold.of_texts(task, model).values())
    for name, some in gold.with_groups(documents, loaded["groups"]).items():
        found |= {f"{name}/{metric}": value for metric, value in gold.means(some).items()}
    if not found:
        fix = "have nothing that can be scored while a run trains; score them with mq eval."
        raise ConfigError(Problem("evaluation.tasks", ", ".join(loaded["tasks"]), fix))
    return found


def _is_asked(task: Any, answering: Writing) -> bool:
    """Whether the harness asks for its answers; programs are not run beside training."""
    if task.OUTPUT_TYPE != "generate_until":
        return True
    return answering.cannot_write is None and not getattr(task, "UNSAFE_CODE", False)


def _flat(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    found = {}
    for task, figures in results.items():
        for name, value in figures.items():
            metric, _, kind = name.partition(",")
            if isinstance(value, float | int) and kind and not metric.endswith("_stderr"):
                found[f"{task}/{metric}" + ("" if kind == "none" else f"/{kind}")] = float(value)
    return found
