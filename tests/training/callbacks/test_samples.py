"""Answers to fixed prompts while a run trains are those of `mq generate`, and change nothing that is learnt."""

import json
import shutil

import pytest

from megatron_qwen.checkpoint.paths import iteration_dir
from megatron_qwen.config.checks import problems
from megatron_qwen.config.source import resolve
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from tests.conftest import run
from tests.distributed import jobs
from tests.tiers import cases
from tools.report import write_report

STEPS, PROMPTS = 6, ["def f(", "import os"]
ASKED = f"evaluation.prompts={json.dumps(PROMPTS)}"


def configure(words, tokenizer, *more):
    length = [f"training.train_iters={STEPS}", "checkpoint.save_interval=2", "evaluation.interval=2"]
    return resolve("tiny_dense", [*words, f"data.tokenizer={tokenizer}", *length, *more], RECIPES)


@pytest.fixture
def words(tokens):
    return [f"data.path={tokens}", "training.global_batch_size=2", "training.eval_iters=0", "metrics.tensorboard=false"]


def samples(run_dir):
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


def losses(run_dir):
    return [json.loads(line)["lm_loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("layout", cases([[]], [["parallel.tensor_model_parallel_size=2"]]))
def test_they_are_those_of_generate(layout, words, tokenizer, pool, tmp_path):
    for name, more in (("asked", [ASKED]), ("plain", [])):
        config = configure(words, tokenizer, *layout, *more)
        RunDirectory(tmp_path / name).claim(config)
        assert pool[2].run(jobs.attempt, config, tmp_path / name) == [0, 0]
    found = samples(tmp_path / "asked")
    assert [(line["iteration"], line["prompt"]) for line in found] == [
        (iteration, prompt) for iteration in (2, 4, 6) for prompt in PROMPTS
    ]
    asked = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    done = run("tools.generate", tmp_path / "asked", *asked, "--temperature", 0, "--max-new-tokens", 64, "--json")
    for one, line in zip(json.loads(done.stdout), found[-2:], strict=True):  # the run's rows are shorter
        assert len(line["text"]) > 20
        assert one["text"].startswith(line["text"].rstrip("\ufffd"))
    assert losses(tmp_path / "asked") == losses(tmp_path / "plain")
    write_report(tmp_path / "asked", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<h2>What it says</h2>" in page
    assert '<td rowspan="3">import os</td><td>2</td>' in page


def test_a_resumed_run_answers_once(words, tokenizer, pool, tmp_path):
    config = configure(words, tokenizer, ASKED)
    RunDirectory(tmp_path / "run").claim(config)
    assert pool[2].run(jobs.attempt, config, tmp_path / "run") == [0, 0]
    whole = samples(tmp_path / "run")
    shutil.rmtree(iteration_dir(tmp_path / "run" / "checkpoints", STEPS))
    with (tmp_path / "run" / "samples.jsonl").open("a") as file:
        file.write('{"iteration": 5, "pro')
    assert pool[2].run(jobs.attempt, config, tmp_path / "run") == [0, 0]
    assert samples(tmp_path / "run") == whole


def test_wrong_prompts(words, tokenizer, tmp_path):
    config = resolve("tiny_dense", [*words, ASKED], RECIPES)
    assert [problem.where for problem in problems(config)] == ["data.tokenizer"]
    long = f"evaluation.prompts={json.dumps(['x ' * 500])}"
    settings = (
        *words,
        f"data.tokenizer={tokenizer}",
        "training.train_iters=1",
        "optim.lr_warmup_iters=0",
        long,
        "--nproc",
        1,
    )
    done = run("launch.train", "tiny_dense", *settings, "--run-dir", tmp_path / "run")
    assert done.returncode == 2
    assert "evaluation.prompts = x x" in done.stderr
    assert "fewer than data.seq_length" in done.stderr
