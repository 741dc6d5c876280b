"""What is known to be wrong before a job is submitted is said then, all of it, with a way out."""

from dataclasses import replace
from pathlib import Path

import pytest

from launch import request as requests
from launch.cluster import load
from launch.preflight import check
from launch.submission import environment_of_job
from tests.conftest import run


def make(*words: str, recipe: str = "qwen2_5_7b", nodes: int = 2, **cluster):
    request = requests.make(recipe, list(words), nodes=nodes, cluster="h100_infiniband", dry=True)
    return replace(request, cluster=replace(request.cluster, **cluster))


def texts(request, **options) -> list[str]:
    return [str(item) for item in check(request, **{"on_site": False, **options}).findings]


def test_everything_at_once():
    words = ("training.global_batch_size=7", "metrics.wandb_project=a\x07")
    request = make("parallel.tensor_model_parallel_size=3", *words)
    found = texts(request)
    assert any("parallel.tensor_model_parallel_size = 3" in text for text in found)
    assert any("ranks = 16: must be divisible by TP x PP x CP" in text for text in found)
    assert any("U+0007" in text for text in found)
    assert any(text.startswith("to do: data.path") for text in found)


def test_state_that_does_not_fit_is_an_error_and_an_estimate_a_warning():
    one_rank = ("parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false")
    alone = make(*one_rank, "parallel.pipeline_model_parallel_size=1", recipe="qwen2_5_14b", nodes=1)
    assert any(text.startswith("ERROR: memory: weights, gradients and optimizer alone") for text in texts(alone))
    wide = ("training.micro_batch_size=32", "training.recompute_granularity=none")
    assert any(text.startswith("warning: memory: an estimated") for text in texts(make(*wide, nodes=1)))
    assert not any("memory" in text for text in texts(make(wide[0], nodes=1))), "the preset recomputes"


def test_tasks_that_there_are_not(tmp_path):
    words = ("data.tokenizer=/somewhere", "evaluation.tasks=[helaswag]")
    assert any("ERROR: evaluation.tasks = helaswag" in text and "hellaswag" in text for text in texts(make(*words)))
    known = texts(make(words[0], "evaluation.tasks=[hellaswag,mmlu]"))
    assert not any("evaluation." in text for text in known), "their data is not looked for here"


def test_disk(tmp_path):
    request = replace(make(recipe="qwen2_5_72b", nodes=128), run_dir=tmp_path / "run")
    found = texts(request, on_site=True)
    assert any("ERROR: disk" in text and "lower checkpoint.keep_last" in text for text in found)
    assert not any("ERROR: disk" in text for text in texts(request))


def test_intervals_against_the_time_limit():
    late = make("checkpoint.save_interval=100000", recipe="qwen2_5_72b", nodes=128)
    assert any("means no save within a job of" in text for text in texts(late))
    short = make(recipe="qwen2_5_72b", nodes=4, signal_delay_s=10)
    assert any("signal_delay_s = 10: is too short" in text for text in texts(short))
    often = make(recipe="qwen2_5_72b", nodes=128, mean_hours_between_faults=100.0)
    assert any("Young and Daly" in text for text in texts(often))


def test_local_checkpoints():
    """A 7B checkpoint has 14 bytes a parameter, 106.6 GB: on each of two nodes half of it, five times over."""
    local = ("checkpoint.local_interval=10",)
    assert not any("local" in text for text in texts(make(*local, memory_per_rank_gib=250.0)))
    small = texts(make(*local, memory_per_rank_gib=32.0))
    assert any("checkpoint.local_dir = /dev/shm: is memory: local checkpoints take 213." in text for text in small)
    assert not any("local_dir" in text for text in texts(make(*local, "checkpoint.local_dir=/nvme/%n")))
    alone = texts(make(*local, nodes=1))
    assert any("local_interval = 10: keeps no copy" in text for text in alone)
    request = make(*local, "checkpoint.local_dir=/runs")
    inside = texts(replace(request, run_dir=Path("/runs/a")))
    assert any("ERROR: checkpoint.local_dir = /runs: holds the run directory" in text for text in inside)


def test_an_interval_that_the_run_chooses_is_not_judged():
    chosen = make("checkpoint.save_interval=null", recipe="qwen2_5_72b", nodes=128, mean_hours_between_faults=100.0)
    assert not any("save_interval" in text for text in texts(chosen))


def test_data_that_is_missing_is_exit_3(tmp_path):
    done = run("launch.command", "submit", "tiny_dense", f"data.path={tmp_path}/none", "--cluster", "local")
    assert done.returncode == 3
    assert "ERROR: " in done.stderr
    assert "Traceback" not in done.stderr


def test_epochs_are_counted(tokens):
    few = make(f"data.path={tokens}", "training.train_iters=100000", recipe="tiny_dense")
    assert any("would be read" in text and "times" in text for text in texts(few))


def test_the_tokenizer_is_compared_with_the_data(tokens, tmp_path, corpus):
    other = tmp_path / "other"
    run("tools.data", "tokenizer", "train", "--vocab-size", "300", "--output", other, corpus, check=True)
    request = make(f"data.path={tokens}", f"data.tokenizer={other}", recipe="tiny_dense")
    assert any("is not the tokenizer" in text for text in texts(request))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["submit", "tiny_dens"], "Did you mean tiny_dense?"),
        (["submit", "tiny_dense", "--nodes", "0"], "--nodes = 0"),
        (["submit", "tiny_dense", "--name", "a b"], "--name = 'a b'"),
        (["submit", "tiny_dense", "--cluster", "local", "--chain", "2"], "has no queue"),
        (["status", "--watch", "-1"], "--watch = -1.0"),
        (["submit", "tiny_dense", "--cluster", "nowhere"], "no such cluster file"),
        (["submit", "tiny_dense", "--cluster", "local", "--nodes", "2"], "is one machine"),
        (["submit", "tiny_dense", "--chain", "0"], "--chain = 0"),
        (["dry-run", "tiny_dense", "--time-limit", "soon"], "must be a time"),
        (["dry-run", "tiny_dense", "modle.num_layers=3"], "Did you mean model.num_layers"),
        (["status", "/nowhere"], "is not a run directory"),
        (["logs", "/nowhere"], "is not a run directory"),
        (["cancel", "/nowhere"], "is not a run directory"),
        (["status", "--nodes", "3"], "unrecognized arguments"),
        (["array", "/nowhere.yaml", "--cluster", "cpu"], "cannot be read"),
    ],
)
def test_wrong_command_lines_end_with_2(arguments, expected):
    done = run("launch.command", *arguments)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_run_roots_are_read_from_here():
    request = requests.make("tiny_dense", [], nodes=1, cluster="cpu", name="x")
    assert request.run_dir == Path.cwd() / "runs" / "x"
    assert load("cpu").run_root == "runs"


def test_events_that_would_be_told_to_nobody():
    request = make(alert_webhook_variable="ALERT_HOOK")
    assert any("alert_webhook_variable = ALERT_HOOK: is not set in this shell" in text for text in texts(request))
    there = replace(request, environ={**request.environ, "ALERT_HOOK": "https://example.org"})
    assert not any("alert_webhook_variable" in text for text in texts(there))
    assert environment_of_job(there)["ALERT_HOOK"] == "https://example.org"
    assert "ALERT_HOOK" not in environment_of_job(make())
