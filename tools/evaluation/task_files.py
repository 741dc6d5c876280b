"""Writes task files of lm-evaluation-harness; those of code are whole ones of this project.

The harness's own tasks of code run what a model has written in the process that evaluates. These run it in the sandbox
(``megatron_qwen/evaluation/code_answers.py``).
"""

from pathlib import Path
from typing import Any

import yaml

from megatron_qwen.evaluation.code_answers import METRIC, SANDBOXED
from megatron_qwen.files import atomic_write

_RUNNER = "run_code"  # module beside the task files, which task files can name functions of
_BEGIN, _END = "!function ", " !end"
Task = dict[str, Any]


def task_file(folder: Path, name: str, content: Task) -> None:
    """Writes a task or a group."""
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)
    # The harness's tag for a function; YAML's own writer would need a type for it.
    atomic_write(folder / f"{name}.yaml", text.replace(f"'{_BEGIN}", _BEGIN).replace(f"{_END}'", ""))


def _function(name: str) -> str:
    return f"{_BEGIN}{name}{_END}"


def code_task(kind: str, *, shots: int) -> Task:
    """What a task of code has besides its data: ``humaneval`` completes a function, ``mbpp`` writes a program."""
    completes = kind == "humaneval"
    asks = '"""\n{{text}}\n{{test_list[0]}}\n"""\n'
    until = (
        ["\nclass ", "\ndef ", "\n#", "\nif ", "\nprint("] if completes else ['\n"""', "\nassert", "\nprint(", "\n#"]
    )
    return {
        "unsafe_code": True,
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}" if completes else asks,
        "doc_to_target": "{{canonical_solution}}" if completes else "{{code}}",
        "target_delimiter": "",
        "num_fewshot": shots,
        "generation_kwargs": {"until": until, "max_gen_toks": 1024, "do_sample": False},
        "filter_list": [
            {"name": "none", "filter": [{"function": "custom", "filter_fn": _function(f"{_RUNNER}.{kind}")}]}
        ],
        "process_results": _function(f"{_RUNNER}.passed"),
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1, SANDBOXED: True},
    }


def write_runner(folder: Path) -> None:
    """The module that task files of code name functions of."""
    text = '"""Written by mq eval fetch: runs answers that are programs in a sandbox."""\n\n'
    text += "from megatron_qwen.evaluation.code_answers import humaneval, mbpp, passed  # noqa: F401\n"
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / f"{_RUNNER}.py", text)
