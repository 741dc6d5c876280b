"""How likely the right answer of a task is: quantities that fall smoothly where accuracy is flat.

Accuracy of a small model stays near chance and then jumps; the log-probability of the right answer does not, so laws
can be fitted to it (Schaeffer et al. 2024, arXiv 2406.04391; Bhagia et al. 2024, arXiv 2412.04403). Of every document:

- ``gold_logprob``: log-probability of the right answer, in nats.
- ``gold_bits_per_byte``: the same, negative, in bits by its UTF-8 bytes, with what the task writes between question and
  answer (a space, mostly): models with different tokenizers can be compared.
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
    for instance in task.instances:
        target = task.doc_to_target(instance.doc)
        target = target[0] if isinstance(target, list) and target else target
        if isinstance(target, str) and target and instance.doc_id not in asked:
            arguments = (instance.args[0], delimiter + target)
            asked[instance.doc_id] = Instance("loglikelihood", instance.doc, arguments, 0)
    found = model.loglikelihood(list(asked.values())) if asked else []
    return {
        number: _measures(score, instance.args[1])
        for (number, instance), (score, _greedy) in zip(asked.items(), found, strict=True)
    }


def add_to(found: dict[str, Any], tasks: Mapping[str, Any], model: HarnessModel, *, chat: bool = False) -> None:
    """Adds the measures to every document of what the harness found, and their means to its results.

    Args:
        found: results with ``samples``; changed.
        tasks: by name.
        model: that was asked.
        chat: as in ``of_texts``.
    """
    for name, samples in found["samples"].items():
        task = tasks[name]
        written = of_texts(task, model, chat=chat) if task.OUTPUT_TYPE == "generate_until" else None
        for sample in samples:
            sample.update(of_choices(task, sample) if written is None else written.get(sample["doc_id"], {}))
        found["results"][name] |= {f"{metric},none": value for metric, value in means(samples).items()}


def means(documents: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of each measure that all documents have."""
    if not documents:
        return {}
    names = [name for name in (LOGPROB, BITS, PROBABILITY) if all(name in one for one in documents)]
    return {name: math.fsum(one[name] for one in documents) / len(documents) for name in names}


def _measures(logprob: float, answer: str) -> dict[str, float]:
    return {LOGPROB: logprob, BITS: -logprob / math.log(2) / max(1, len(answer.encode()))}


def _is_index(value: object, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count
