"""The figures at the top of a report, from records that are written by hand."""

import json
import re

import pytest

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.config.source import resolve
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from tools.report import write_report


def record(iteration, *, seconds, speed, **more):
    """One line of metrics.jsonl."""
    return {
        "iteration": iteration,
        "consumed_tokens": 250_000 * iteration,
        "lm_loss": 3.0 - 0.1 * iteration,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "tokens_per_second": speed,
        "step_time_s": seconds,
        "mfu": None,
        "skipped": False,
        **more,
    }


@pytest.fixture
def tiles(tmp_path):
    """What the tiles say, by their captions."""
    run_dir = tmp_path / "run"
    RunDirectory(run_dir).claim(resolve("tiny_dense", ["data.path=/nowhere/text"], RECIPES))
    records = [
        record(1, seconds=30.0, speed=10.0, peak_memory_gib=1.25),
        record(2, seconds=20.0, speed=20.0, validation_loss=2.9),
        *(record(number, seconds=10.0, speed=30.0) for number in (3, 4, 5)),
        record(6, seconds=10.0, speed=40_000.0, mfu=0.25, peak_memory_gib=2.5),
        record(7, seconds=10.0, speed=50_000.0, mfu=0.5, skipped=True, lm_loss=None),
        record(8, seconds=15.0, speed=90_000.0, mfu=0.375, peak_memory_gib=2.0, validation_loss=2.25),
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    (run_dir / "performance.json").write_text(json.dumps({"goodput": {"share": 0.625, "steps_s": 5, "other_s": 3}}))
    write_report(run_dir, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    found = re.findall(r'<div class="tile"><b>(.*?)</b><span>(.*?)</span></div>', page)
    return {caption: value for value, caption in found}, page


def test_tiles_by_hand(tiles):
    """Losses are the last; medians leave the first five steps out; times and tokens are sums over all steps."""
    assert tiles[0] == {
        "validation loss, nats per token": "2.2500",
        "training loss at step 8": "2.2000",
        "tokens seen": "2.00M",
        "tokens per second, median": "50,000",
        "time in steps": "1 min 55 s",
        "MFU, median": "37.5%",
        "goodput: share of steps that count": "62.5%",
        "peak memory of rank 0": "2.50 GiB",
        "steps skipped: not finite": "1",
    }


def test_shares_of_time_are_of_the_sum(tiles):
    assert "steps that count 5 s (62.5%)" in tiles[1]
    assert "other 3 s (37.5%)" in tiles[1]


def test_what_followed_each_attempt(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.claim(resolve("tiny_dense", ["data.path=/nowhere/text"], RECIPES))
    log = AttemptLog(directory.attempts)
    ended = {"reason": "lost peer", "detail": "rank 1 was killed", "fault": "program", "action": "restart"}
    log.end(log.begin(nodes=["n1", "n2"]), exit_code=76, iterations_gained=12, **ended)
    log.begin(nodes=["n1", "n3"])
    directory.metrics.write_text(json.dumps(record(1, seconds=1.0, speed=10.0)) + "\n")
    write_report(directory.path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    table = page[page.index("<tr><th>attempt</th>") :]
    rows = [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", table)]
    assert rows[:3] == [
        ["attempt", "ended", "cause", "fault", "nodes", "exit code", "iterations gained", "action"],
        ["1", "lost peer", "rank 1 was killed", "program", "n1, n2", "76", "12", "restart"],
        ["2", "still running, or killed", "", "", "n1, n3", "", "", ""],
    ]


def test_fine_tuning_has_its_own_figure(tmp_path):
    """Loss by who wrote, the ends of turns, and how full rows are: 900 of 1,024 positions after the first step."""
    run_dir = tmp_path / "run"
    RunDirectory(run_dir).claim(resolve("tiny_dense", ["data.path=/nowhere/text"], RECIPES))
    lines = [
        record(
            number,
            seconds=1.0,
            speed=9.0,
            seq_length=512,
            consumed_samples=2 * number,
            trained_fraction=0.4,
            end_probability=0.1 * number,
            **({"validation_loss/chats/assistant": 2.0, "validation_loss/chats/prompt": 5.0} if number > 1 else {}),
        )
        | {"consumed_tokens": 900 * number}
        for number in (1, 2, 3)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(run_dir, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<b>87.9%</b><span>of the rows' positions held tokens</span>" in page
    for text in ("<h2>Conversations</h2>", "chats/assistant", "chats/prompt", "end of a turn where one ends, training"):
        assert text in page


def test_pretraining_has_none(tiles):
    assert "<h2>Conversations</h2>" not in tiles[1]
