"""``mq eval``: what it says and refuses, going on after a kill, and comparisons."""

import json
import signal
import subprocess

import numpy as np
import pytest

from megatron_qwen.errors import ConfigError, DataError
from megatron_qwen.evaluation.tasks import find_tasks, load_tasks
from tests.conftest import command, environment, run
from tests.evaluation.tasks import ANSWER, CHOICE, TEXT, write_tasks
from tests.processes.waiting import wait_for_lines
from tools.evaluation.compare import compare, paired, table
from tools.evaluation.intervals import interval
from tools.generation.chat import chat_template

ITEMS = 12
ALL = f"{CHOICE},{ANSWER},{TEXT}"
GOLD = {"gold_logprob", "gold_bits_per_byte"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks", items=ITEMS)


@pytest.fixture(scope="module")
def scores(finished_run, folder, tmp_path_factory):
    """Outputs of the run's two checkpoints."""
    found = []
    for iteration in (4, 8):
        found.append(tmp_path_factory.mktemp("scores") / str(iteration))
        words = ("--tasks", ALL, "--task-dir", folder, "--iteration", iteration, "--output", found[-1])
        run("tools.eval", finished_run, *words, check=True)
    return found


def test_json_is_the_harness_results_object(finished_run, folder, scores):
    words = ("--tasks", CHOICE, "--task-dir", folder, "--limit", 5, "--shots", 1, "--json")
    found = json.loads(run("tools.eval", finished_run, *words, check=True).stdout)
    assert list(found) == [CHOICE]
    assert 0 <= found[CHOICE]["acc,none"] <= 1
    whole = json.loads((scores[1] / "results.json").read_text())
    assert whole["results"].keys() == {CHOICE, ANSWER, TEXT}
    assert whole["mq"]["model"]["model"]["iteration"] == 8
    assert whole["n-samples"][CHOICE] == {"original": ITEMS, "effective": ITEMS}


def test_after_a_kill_it_goes_on(finished_run, folder, scores, tmp_path):
    output = tmp_path / "scores"
    words = command("tools.eval", finished_run, "--tasks", ALL, "--task-dir", folder, "--output", output)
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_lines(process, output / "answered.jsonl", 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "results.json").exists()
    with (output / "answered.jsonl").open("ab") as file:
        file.write(b'{"key": "half')
    done = run("tools.eval", finished_run, *words[words.index("--tasks") :])
    assert done.returncode == 0, done.stderr
    found, whole = (json.loads((path / "results.json").read_text()) for path in (output, scores[1]))
    assert found["mq"]["answered_before"] > 0
    assert found["results"] == whole["results"]
    for task in whole["results"]:
        assert (output / f"samples/{task}.jsonl").read_text() == (scores[1] / f"samples/{task}.jsonl").read_text()


def test_answers_of_another_model_are_refused(finished_run, folder, tmp_path):
    head = json.dumps({"identity": {"model": "another"}})
    (tmp_path / "answered.jsonl").write_text(head + "\n")
    done = run("tools.eval", finished_run, "--tasks", CHOICE, "--task-dir", folder, "--output", tmp_path)
    assert done.returncode == 2
    assert "has answers of something else" in done.stderr
    assert (tmp_path / "answered.jsonl").read_text() == head + "\n"


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (
            ("--limit", 0, "--shots", -1, "--system", "x", "--replicas", 0),
            2,
            ["--tasks", "--limit", "--shots", "--system"],
        ),
        (("--tasks", CHOICE, "--iteration", 5), 4, ["5"]),
        (("--tasks", CHOICE, "parallel.tensor_model_parallel_size=3"), 2, ["KV heads"]),
        (("--tasks", f"{CHOICE},local_choise"), 2, ["is no task", "Did you mean local_choice"]),
        (("--tasks", "greedy_beams"), 2, ["num_beams"]),
    ],
)
def test_what_is_refused(words, code, told, finished_run, broken):
    done = run("tools.eval", finished_run, "--task-dir", broken, *words)
    assert done.returncode == code, done.stderr
    assert all(text in done.stderr for text in told), done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def broken(folder):
    """The tasks, and some that cannot be run."""
    rest = "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{context}}'\ndoc_to_target: answer\n"
    rest += "metric_list: [{metric: exact_match}]\n"
    beams = "generation_kwargs: {num_beams: 4, max_gen_toks: 4, until: ['x']}"
    for name, data, more in (
        ("broken", "missing", ""),
        ("fixed", ANSWER, "num_fewshot: 0"),
        ("greedy_beams", ANSWER, beams),
        ("long_answer", ANSWER, "generation_kwargs: {max_gen_toks: 4000, until: ['x']}"),
    ):
        files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/{data}.jsonl}}}}\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{files}{rest}{more}\n")
    return folder


def test_a_tokenizer_without_a_template(tokenizer):
    with pytest.raises(ConfigError, match="no chat template"):
        chat_template(tokenizer)


def test_tasks_that_cannot_be_loaded(broken, tmp_path):
    with pytest.raises(ConfigError, match="is not a directory"):
        find_tasks([CHOICE], [tmp_path / "none"])
    manager, names = find_tasks([CHOICE, "broken", "fixed"], [broken])
    with pytest.raises(ConfigError) as raised:
        load_tasks(manager, names, shots=3)
    assert "broken: cannot be loaded" in str(raised.value).replace(" = ", ": ")
    assert "fixes 0 examples" in str(raised.value)


def test_two_models_are_compared(scores, tmp_path):
    found = compare(*scores)
    assert {task: set(rows) for task, rows in found.items()} == {
        CHOICE: {"acc", "acc_norm", *GOLD, "gold_probability"},
        ANSWER: {"exact_match", *GOLD},
    }
    done = run("tools.eval", *scores, check=True)
    assert done.stdout.strip() == table(found)
    assert json.loads(run("tools.eval", *scores, "--json", check=True).stdout) == found
    same = compare(scores[0], scores[0])
    assert all(row["p"] == 1.0 and row["difference"] == 0 for rows in same.values() for row in rows.values())
    with pytest.raises(DataError, match=r"no results.json"):
        compare(scores[0], tmp_path)


def test_paired_figures():
    """Against McNemar's exact test by hand: 8 better, 1 worse, p = 2 (C(9,0) + C(9,1)) / 2^9."""
    first = np.array([0.0] * 8 + [1.0] + [1.0] * 11)
    second = np.array([1.0] * 8 + [0.0] + [1.0] * 11)
    found = paired(first, second)
    assert found["p"] == pytest.approx(2 * (1 + 9) / 2**9)
    assert found["difference"] == pytest.approx(7 / 20)
    low, high = found["interval"]
    assert 0 < low < 7 / 20 < high
    dice = np.random.default_rng(1)
    values = dice.normal(size=400)
    other = values + dice.normal(0.2, 1.0, size=400)
    from scipy.stats import ttest_rel

    assert paired(values, other)["p"] == pytest.approx(ttest_rel(values, other).pvalue, abs=0.01)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of 200 samples of 50 items each; 95 % of them, give or take what 200 draws of a percentile interval vary."""
    dice = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        low, high = interval(dice.normal(size=50), lambda values, axis: values.mean(axis=axis))
        held += low <= 0 <= high
    assert 176 <= held <= 199
    assert interval(np.ones(7), lambda values, axis: values.mean(axis=axis)) == [1.0, 1.0]


def test_more_examples_than_there_are(finished_run, folder):
    done = run("tools.eval", finished_run, "--tasks", CHOICE, "--task-dir", folder, "--shots", 5000)
    assert done.returncode == 2
    assert f"{CHOICE}: cannot be asked. It said: " in done.stderr.replace(" =", "")
    assert "Traceback" not in done.stderr
