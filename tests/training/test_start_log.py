"""What a run says when it starts: little on the terminal, all in its log."""

from megatron_qwen.estimate import choices
from tests.conftest import run

_MOST_LINES = 8


def details(text: str) -> list[str]:
    return [line.split("performance: ", 1)[1] for line in text.splitlines() if "performance: " in line]


def before_the_first_step(text: str) -> list[str]:
    lines = text.splitlines()
    return lines[: next(index for index, line in enumerate(lines) if line.startswith("step "))]


def test_few_lines_on_the_terminal_and_every_choice_in_the_log(tokens, tmp_path):
    words = [f"data.path={tokens}", "optim.lr_warmup_iters=0", "--nproc", 2, "--run-dir", tmp_path / "run"]
    done = run("launch.train", "tiny_moe", "training.train_iters=1", *words, check=True)
    assert len(before_the_first_step(done.stderr)) <= _MOST_LINES, done.stderr
    (line,) = details(done.stderr)
    assert line.startswith(f"the preset chose {len(choices._RULES)} values; ")
    assert "performance.json" in line

    kept = details((tmp_path / "run/logs/attempt_001/rank_0.log").read_text())
    assert kept[0] == line
    assert "parallel.overlap_grad_reduce=false: no overlap of communication with compute on a CPU" in kept
    assert any(one.startswith("performance.garbage_collection_interval=100: ") for one in kept)
    assert kept[1].startswith("output layer and cross-entropy fused")
    assert [one.partition("=")[0] for one in kept[2:]] == list(choices._RULES)
    asked = (tmp_path / "run" / "checkpoints" / "iter_0000001" / "run.yaml").read_text()
    assert "overlap_grad_reduce: null" in asked  # another machine may choose otherwise

    again = run("launch.train", "tiny_moe", "training.train_iters=2", *words, "--verbose", check=True)
    assert [one.partition("=")[0] for one in details(again.stderr)[2:]] == list(choices._RULES)


def test_a_resume_is_not_buried(tmp_path, tokens):
    words = [f"data.path={tokens}", "optim.lr_warmup_iters=0", "--run-dir", tmp_path / "run"]
    run("launch.train", "tiny_dense", "training.train_iters=1", *words, check=True)
    done = run("launch.train", "tiny_dense", "training.train_iters=4", *words, check=True)
    lines = before_the_first_step(done.stderr)
    assert any("resumed from" in line and "at iteration 1" in line for line in lines)
    assert len(lines) <= _MOST_LINES + 1, "and a line that says what the new length does to the rate"
    assert any("the learning rate of step 2 is" in line for line in lines)
