"""The part of a report about ranks: which colours the map has, and which ranks the table names."""

import json
import math
import re

import pytest

from megatron_qwen.config.source import resolve
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from tests.tools.test_report import record
from tools.report import write_report
from tools.report_ranks import RankHistory, _edges, _rows, read_history


def page(tmp_path, lines, stragglers=()) -> str:
    run_dir = tmp_path / "run"
    RunDirectory(run_dir).claim(resolve("tiny_dense", ["data.path=/nowhere/text"], RECIPES))
    records = [record(number, seconds=1.0, speed=10.0) for number in range(1, 11)]
    for number, found in stragglers:
        records[number - 1]["stragglers"] = found
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    if lines:
        (run_dir / "stragglers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(run_dir, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text()


HEAD = {"attempt": 1, "nodes": ["n1", "n<2>"]}


def window(iteration, *scores):
    return {"iteration": iteration, "attempt": 1, "windows": 1, "score": scores}


def test_the_slow_ranks_are_named(tmp_path):
    slow = {"rank": 1, "node": "n<2>", "score": 0.6, "cause": "compute"}
    named = [(number, [{**slow, "score": score}]) for number, score in ((6, 0.6), (7, 0.45), (8, 0.65))]
    found = page(tmp_path, [HEAD, window(5, 1.0, 0.5), window(10, 1.0, None)], named)
    assert "<h2>Ranks</h2>" in found
    assert "<td>1</td><td>n&lt;2&gt;</td><td>6 to 8</td><td>0.45</td><td>compute</td>" in found
    assert "n<2>" not in re.sub(r"<svg.*?</svg>", "", found, flags=re.DOTALL)


def test_where_no_rank_was_slow(tmp_path):
    assert "No rank was slow for long." in page(tmp_path, [HEAD, window(5, 1.0, 1.0)])


@pytest.mark.parametrize("lines", [[], [HEAD], [{"attempt": 1}]])
def test_without_measurements_there_is_no_such_part(lines, tmp_path):
    assert "<h2>Ranks</h2>" not in page(tmp_path, lines)


def test_lines_of_another_layout_are_left_out(tmp_path):
    path = tmp_path / "s.jsonl"
    lines = [{"nodes": ["n1"]}, window(5, 1.0), HEAD, window(10, 1.0, None)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iter')
    found = read_history(path)
    assert found.iterations == [10]
    assert found.nodes == ["n1", "n<2>"]
    assert found.scores[0][0] == 1.0
    assert math.isnan(found.scores[0][1])


def test_many_ranks_share_rows_that_show_the_slowest():
    scores = [[1.0] * 300, [1.0] * 300]
    scores[1][200] = 0.4
    scores[0][0] = math.nan
    rows = _rows(RankHistory([5, 10], scores, ["n"] * 300))
    assert len(rows) == 100  # three ranks a row
    assert rows[66] == [1.0, 0.4]
    assert rows[0] == [1.0, 1.0]


def test_a_column_ends_with_its_last_step():
    assert _edges([10, 20, 25]) == [0, 10, 20, 25]
    assert _edges([5]) == [0, 5]
    assert _edges([110, 120]) == [100, 110, 120]
