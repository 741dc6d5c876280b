"""How likely the right answer of a task is: quantities that fall smoothly where accuracy is flat.

Accuracy of a small model stays near chance and then jumps; the log-probability of the right answer does not, so laws
can be fitted to it (Schaeffer et al. 2024, arXiv 2406.04391; Bhagia et al. 2024, arXiv 2412.04403). Of every document:

- ``gold_logprob``: log-probability of the right answer, in nats.
- ``gold_bits_per_byte``: the same, negative, in bits by its UTF-8 bytes, with what the task writes between question and
  answer (a space, mostly): models with different tokenizers can be compared.
- ``gold_left_out``: how many documents have no measure, where some have.
- ``gold_probability``: of the right choice among the choices alone; of tasks with choices.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance

from megatron_qwen.evaluation.code_answers import SANDBOXED
from megatron_qwen.evaluation.harness import HarnessModel

LOGPROB, BITS, PROBABILITY = "gold_logprob", "gold_bits_per_byte", "gold_probability"
LEFT_OUT = "gold_left_out"
_Document = Mapping[str, Any]


def of_choices(task: Any, sample: Mapping[str, Any]) -> dict[str, float]:
    """Of a document whose answers were scored; empty where the task does not say which answer is right.

    Args:
        task: of the harness.
        sample: as the harness logs it.
    """
    if task.OUTPUT_TYPE == "loglikelihood":
        return _measures(float(sample["resps"][0][0][0]), sample["arguments"][0][1])
    if task.OUTPUT_TYPE != "multiple_choice":
        return {}
    choices = task.doc_to_choice(sample["doc"])
    # Behind the choices a task may have asked for them without the question (acc_mutual_info).
    scores = np.array([resps[0][0] for resps in sample["resps"][: len(choices)]], dtype=np.float64)
    right = task.doc_to_text(sample["doc"]) if task.multiple_input else task.doc_to_target(sample["doc"])
    if isinstance(right, str):
        right = choices.index(right) if right in choices else None
    allowed = [one for one in (right if isinstance(right, list) else [right]) if _is_index(one, len(choices))]
    if not allowed:
        return {}
    best = max(allowed, key=lambda one: scores[one])
    shares = np.exp(scores - scores.max())
    share = float(shares[allowed].sum() / shares.sum())
    return {**_measures(float(scores[best]), sample["arguments"][best][1]), PROBABILITY: share}


def of_texts(task: Any, model: HarnessModel, *, chat: bool = False) -> dict[int, dict[str, float]]:
    """Of a task whose answers are written: its own answers are scored behind the same prompts, by document.

    Args:
        task: of the harness, with its requests.
        model: that is asked.
        chat: whether the prompts are turns of a chat, which end where an answer begins.
    """
    if getattr(task, "UNSAFE_CODE", False) and not (task.config.metadata or {}).get(SANDBOXED):
        return {}  # what the harness's tasks of code call their target is the code of its tests
    delimiter = "" if chat else task.config.target_delimiter
    asked: dict[int, Instance] = {}
    found: dict[int, dict[str, float]] = {}
    for instance in task.instances:
        target = task.doc_to_target(instance.doc)
        target = target[0] if isinstance(target, list) and target else target
        if isinstance(target, str) and target and instance.doc_id not in asked:
            arguments = (instance.args[0], delimiter + target)
            if len(model.tok_encode(arguments[1])) > model.max_length:
                found[instance.doc_id] = {}
                continue
            asked[instance.doc_id] = Instance("loglikelihood", instance.doc, arguments, 0)
    answers = model.loglikelihood(list(asked.values())) if asked else []
    for (number, instance), (score, _greedy) in zip(asked.items(), answers, strict=True):
        found[number] = _measures(score, instance.args[1])
    return found


def add_to(found: dict[str, Any], loaded: Mapping[str, Any], model: HarnessModel, *, chat: bool = False) -> None:
    """Adds the measures to every document of what the harness found, and their means to its results.

    Args:
        found: results with ``samples``; changed.
        loaded: tasks and groups by name.
        model: that was asked.
        chat: as in ``of_texts``.
    """
    for name, samples in found["samples"].items():
        task = loaded["tasks"][name]
        written = of_texts(task, model, chat=chat) if task.OUTPUT_TYPE == "generate_until" else None
        for sample in samples:
            sample.update(of_choices(task, sample) if written is None else written.get(sample["doc_id"], {}))
    for name, documents in with_groups(found["samples"], loaded["groups"]).items():
        figures = {f"{metric},none": value for metric, value in means(documents).items()}
        for results in (found["results"], found.get("groups", {})):
            if name in results:
                results[name] |= figures


def with_groups(documents: Mapping[str, Sequence[_Document]], groups: Mapping[str, Any]) -> dict[str, list[_Document]]:
    """Documents by task, and by group those of all its tasks; groups that lack a task are left out."""
    found = {name: list(some) for name, some in documents.items()}
    for name, group in groups.items():
        tasks = sorted(tasks_of(group))
        if all(task in documents for task in tasks):
            found[name] = [one for task in tasks for one in documents[task]]
    return found


def tasks_of(group: Any) -> set[str]:
    """Names of the tasks of a group of the harness, those of its groups too."""
    return {str(task.task_name) for task in group.get_all_tasks()}


def means(documents: Sequence[_Document]) -> dict[str, float]:
    """Mean of each measure over the documents that have it; how many of them do not, where some do and some do not.

    An answer that is longer than the model's context has none.
    """
    found: dict[str, float] = {}
    for name in (LOGPROB, BITS, PROBABILITY):
        if values := [one[name] for one in documents if name in one]:
            found[name] = math.fsum(values) / len(values)
    missing = sum(LOGPROB not in one for one in documents)
    return {**found, LEFT_OUT: missing} if found and missing else found


def _measures(logprob: float, answer: str) -> dict[str, float]:
    return {LOGPROB: logprob, BITS: -logprob / math.log(2) / max(1, len(answer.encode()))}


def _is_index(value: object, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count
