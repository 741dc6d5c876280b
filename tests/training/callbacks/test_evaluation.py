"""Tasks while a run trains: the same scores under every layout and as of the checkpoint, and training that goes on."""

import json
import math
import os
import signal
import subprocess
import time

import pytest

from megatron_qwen.config.source import resolve
from megatron_qwen.recipes.registry import RECIPES
from tests.conftest import ROOT, command, environment, run
from tests.evaluation.tasks import ANSWER, CHOICE, TEXT, WRITTEN, write_tasks
from tests.tiers import cases
from tests.training.attempts import attempt

TASKS = f"evaluation.tasks=[{CHOICE},{ANSWER},{TEXT},{WRITTEN}]"
_FIGURE = f"eval/{WRITTEN}/sum_of_characters"
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def _offline():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE"):
            patch.setenv(name, "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks", items=9)


@pytest.fixture(scope="module")
def words(tokens, tokenizer):
    files = [f"data.path={tokens}", f"data.tokenizer={tokenizer}"]
    return [*files, f"training.train_iters={STEPS}", "training.eval_interval=2", "training.eval_iters=2"]


@pytest.fixture(scope="module")
def evaluated(words, folder):
    return [*words, TASKS, f"evaluation.task_dir={folder}", "evaluation.interval=2", "evaluation.examples=7"]


@pytest.fixture(scope="module")
def trained(pool, evaluated, tmp_path_factory):
    """Records of a run on one rank, and its directory, by recipe."""
    made = {}

    def of(recipe):
        if recipe not in made:
            run_dir = tmp_path_factory.mktemp(recipe) / "run"
            made[recipe] = attempt(pool, 1, resolve(recipe, evaluated, RECIPES), run_dir), run_dir
        return made[recipe]

    return of


def scores(record):
    return {name: value for name, value in record.items() if name.startswith(("eval/", "validation_bits_per_byte/"))}


def test_training_is_as_without_it(pool, trained, words, tmp_path):
    records, _ = trained("tiny_dense")
    plain = attempt(pool, 1, resolve("tiny_dense", words, RECIPES), tmp_path / "run")
    for one, two in zip(records, plain, strict=True):
        for name in ("lm_loss", "grad_norm", "consumed_tokens"):
            assert one[name] == two[name]
        assert one.get("validation_loss") == two.get("validation_loss")
    assert [bool(scores(record)) for record in records] == [False, True, False, True]
    assert all(record["evaluation_s"] > 0 for record in records[1::2])
    assert scores(records[1]) != scores(records[3])


def test_they_are_the_scores_of_the_checkpoint(trained, folder):
    records, run_dir = trained("tiny_dense")
    words = (
        "--tasks",
        f"{CHOICE},{ANSWER},{TEXT},{WRITTEN}",
        "--task-dir",
        folder,
        "--limit",
        7,
        "--context",
        64,
        "--json",
    )
    found = json.loads(run("tools.eval", run_dir, *words, check=True).stdout)
    expected = {
        f"eval/{task}/{name.removesuffix(',none')}": value
        for task, figures in found.items()
        for name, value in figures.items()
        if name.endswith(",none") and "stderr" not in name
    }
    here = {name: value for name, value in records[-1].items() if name.startswith("eval/")}
    assert here == pytest.approx(expected, rel=1e-6)
    assert here[_FIGURE] == expected[_FIGURE] > 0, "other texts were written"
    assert {f"eval/{ANSWER}/gold_logprob", f"eval/{CHOICE}/gold_probability", f"eval/{TEXT}/bits_per_byte"} <= set(here)


@pytest.mark.parametrize(
    ("recipe", "ranks", "layout"),
    cases(
        [
            ("tiny_dense", 2, ["tensor_model_parallel_size=2", "sequence_parallel=true"]),
            ("tiny_dense", 2, ["pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2"]),
            ("tiny_dense", 2, ["context_parallel_size=2"]),
            ("tiny_moe", 2, ["expert_model_parallel_size=2"]),
        ],
        [
            ("tiny_dense", 2, []),
            ("tiny_dense", 2, ["tensor_model_parallel_size=2"]),
            ("tiny_dense", 2, ["pipeline_model_parallel_size=2"]),
            ("tiny_dense", 4, ["tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"]),
        ],
    ),
)
def test_every_layout_finds_the_same(pool, trained, evaluated, tmp_path, recipe, ranks, layout):
    expected, _ = trained(recipe)
    words = [*evaluated, *(f"parallel.{word}" for word in layout)]
    records = attempt(pool, ranks, resolve(recipe, words, RECIPES), tmp_path / "run")
    written = {name for name in scores(expected[-1]) if name in (_FIGURE, f"eval/{ANSWER}/exact_match")}
    lacks = any("virtual" in word or "context" in word for word in layout)
    for one, two in zip(records, expected, strict=True):
        both = {name: value for name, value in scores(two).items() if not (lacks and name in written)}
        assert scores(one) == pytest.approx(both, rel=2e-6)


def test_bits_per_byte_of_sources_add_up_to_the_loss(pool, words, corpus, tokenizer, tmp_path):
    """Two sources: bytes and losses together are those of all held-out text."""
    blend = {"sources": {}, "stages": [{"name": "only", "weights": {"a": 1, "b": 1}}]}
    lines = corpus.read_text().splitlines(keepends=True)
    for name, some in (("a", lines[0::2]), ("b", lines[1::2])):
        text, prefix = tmp_path / f"{name}.jsonl", tmp_path / name
        text.write_text("".join(some))
        run("tools.data", "prepare", "--tokenizer", tokenizer, "--output", prefix, text, check=True)
        blend["sources"][name] = {"path": str(prefix)}
    (tmp_path / "blend.yaml").write_text(json.dumps(blend))
    changed = [word for word in words if not word.startswith("data.path")]
    config = resolve("tiny_dense", [*changed, f"data.blend={tmp_path / 'blend.yaml'}"], RECIPES)
    record = attempt(pool, 1, config, tmp_path / "run")[-1]
    found = {name: record[f"validation_bits_per_byte/{name}"] for name in "ab"}
    nats, counts = held_out_bytes(config, tokenizer, record["validation_loss"])
    assert sum(found[name] * counts[name] for name in "ab") == pytest.approx(nats / math.log(2), rel=1e-6)
    assert found["a"] != found["b"]


def held_out_bytes(config, tokenizer, loss):
    """Nats of all that was validated, and bytes by source, as the tokenizers library decodes them one by one."""
    from tokenizers import Tokenizer

    from megatron_qwen.data.reading.training_data import TrainingData

    library = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    control = set(library.get_added_tokens_decoder())
    data = TrainingData(config)
    samples = data.validation(data.at(0))
    counts, tokens = dict.fromkeys(samples.names, 0), 0
    for index in range(config.training.eval_iters * config.training.global_batch_size):
        labels = [int(one) for one in samples[index].labels]
        tokens += len(labels)
        # A character of a byte-level token is a byte.
        text = "".join(library.id_to_token(one) for one in labels if one not in control)
        counts[samples.names[samples.source_of(index)]] += len(text)
    return loss * tokens, counts


def test_killed_during_an_evaluation_it_finds_the_same_when_resumed(evaluated, folder, tmp_path):
    command_line = [*evaluated, f"training.train_iters={STEPS}", "checkpoint.save_interval=1", "--run-dir"]
    run("launch.train", "tiny_dense", *command_line, tmp_path / "whole", check=True)
    killed = tmp_path / "killed"
    began = subprocess.Popen(
        command("launch.train", "tiny_dense", *command_line, killed),
        env=environment(),
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    until, beat = time.monotonic() + 120, killed / "heartbeat.json"
    while time.monotonic() < until:
        if beat.is_file() and json.loads(beat.read_text())["phase"] == "evaluating":
            break
        assert began.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    os.killpg(began.pid, signal.SIGKILL)
    began.wait()
    assert not any(scores(record) for record in read(killed) if record["iteration"] >= 2)
    run("launch.train", "tiny_dense", *command_line, killed, check=True)
    for one, two in zip(read(killed), read(tmp_path / "whole"), strict=True):
        assert (scores(one), one["lm_loss"]) == (scores(two), two["lm_loss"])


def read(run_dir):
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_a_task_that_there_is_not_is_said_before_the_first_step(evaluated, tmp_path):
    wrong = f"evaluation.tasks=[{CHOICE},local_anwser]"
    done = run("launch.train", "tiny_dense", *evaluated, wrong, "--nproc", 2, "--run-dir", tmp_path / "run")
    assert done.returncode == 2, done.stderr
    assert "local_anwser: is no task of the harness. Did you mean local_answer" in done.stderr.replace(" =", "")
    assert "Traceback" not in done.stderr
    assert not read(tmp_path / "run")


def test_what_cannot_be_asked_is_said_on_all_ranks(evaluated, tmp_path):
    words = [*evaluated, "evaluation.shots=5000", "--nproc", 2, "--run-dir", tmp_path / "run"]
    done = run("launch.train", "tiny_dense", *words)
    assert done.returncode == 2, done.stderr
    assert "cannot be asked of a run" in done.stderr
    assert "Traceback" not in done.stderr
