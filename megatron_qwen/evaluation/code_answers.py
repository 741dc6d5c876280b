"""Tasks whose answers are programs: they are run with the task's tests, in the sandbox.

Task files name these functions (``mq eval fetch`` writes them). The harness's own tasks of this kind run what a model
has written in its own process, and are refused.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_qwen.errors import UserError
from megatron_qwen.evaluation.sandbox import Outcome, SandboxError, run_programs

METRIC = "pass@1"
# In the metadata of a task whose programs are run by this module alone.
SANDBOXED = "sandboxed"
Document = Mapping[str, Any]
Ran = list[list[tuple[bool, str]]]


def humaneval(answers: Sequence[Sequence[str]], documents: Sequence[Document]) -> Ran:
    """Runs functions that an answer completes (Chen et al. 2021, arXiv 2107.03374).

    Args:
        answers: of every document, all its samples.
        documents: with prompt, test and entry_point.

    Returns:
        Of every sample whether it passed, and why not.
    """
    return _run(answers, documents, _humaneval_program)


def mbpp(answers: Sequence[Sequence[str]], documents: Sequence[Document]) -> Ran:
    """Runs programs that an answer is (Austin et al. 2021, arXiv 2108.07732), with the tests of the document.

    Args:
        answers: of every document, all its samples.
        documents: with test_setup_code and test_list.
    """
    return _run(answers, documents, _mbpp_program)


def passed(document: Document, results: Sequence[Sequence[tuple[bool, str]]]) -> dict[str, float]:
    """Share of a document's samples that passed: an estimate of pass@1 without bias."""
    samples = results[0]
    return {METRIC: sum(one for one, _ in samples) / len(samples)}


def _run(
    answers: Sequence[Sequence[str]], documents: Sequence[Document], program: Callable[[str, Document], str]
) -> Ran:
    programs = [program(text, doc) for texts, doc in zip(answers, documents, strict=True) for text in texts]
    try:
        outcomes = iter(run_programs(programs))
    except SandboxError as error:
        text = f"the programs of a task cannot be run: {error}. Mend that and repeat the command"
        raise UserError(f"{text}; with --output it finds the answers that are there.") from error
    return [[_pair(next(outcomes)) for _ in texts] for texts in answers]


def _pair(outcome: Outcome) -> tuple[bool, str]:
    return outcome.passed, outcome.why


def _humaneval_program(answer: str, document: Document) -> str:
    return f"{document['prompt']}{answer}\n{document['test']}\ncheck({document['entry_point']})\n"


def _mbpp_program(answer: str, document: Document) -> str:
    tests = "\n".join(document["test_list"])
    return f"{answer}\n{document.get('test_setup_code') or ''}\n{tests}\n"
