"""stragglers.jsonl stays small, and loses no slowness when it is shortened."""

import json
import math

from megatron_qwen.metrics.straggler_file import StragglerFile


def windows(path) -> list[dict]:
    return [line for line in map(json.loads, path.read_text().splitlines()) if "score" in line]


def heads(path) -> list[dict]:
    return [line for line in map(json.loads, path.read_text().splitlines()) if "nodes" in line]


def figures(score: float, own: float = 1.0) -> dict[str, list[float]]:
    return {"score": [score, 1.0], "compute_s": [own, 1.0]}


def write(
    path, count: int, *, attempt: int = 1, resumed_at: int = 0, nodes=("n1", "n2"), lines: int = 8
) -> StragglerFile:
    file = StragglerFile(path, attempt=attempt, resumed_at=resumed_at, nodes=nodes, lines=lines)
    for number in range(1, count + 1):
        file.add(resumed_at + 5 * number, figures(1.0))
    return file


def test_a_line_a_window(tmp_path):
    file = StragglerFile(tmp_path / "s.jsonl", attempt=3, resumed_at=0, nodes=["n1", "n2"])
    file.add(5, {"score": [0.123456, math.nan], "compute_s": [1234.5, 0.00123456]})
    assert heads(file.path) == [{"attempt": 3, "nodes": ["n1", "n2"]}]
    assert windows(file.path) == [
        {"iteration": 5, "attempt": 3, "windows": 1, "score": [0.123, None], "compute_s": [1230.0, 0.00123]}
    ]


def test_lines_are_joined_and_the_lowest_score_stays(tmp_path):
    file = StragglerFile(tmp_path / "s.jsonl", attempt=1, resumed_at=0, nodes=["n1", "n2"], lines=4)
    for number, score in enumerate([1.0, 0.4, 1.0, 1.0, 0.9], start=1):
        file.add(5 * number, figures(score, own=float(number)))
    lines = windows(file.path)
    assert [(line["iteration"], line["windows"]) for line in lines] == [(10, 2), (20, 2)]
    assert [line["score"][0] for line in lines] == [0.4, 1.0]
    assert [line["compute_s"][0] for line in lines] == [1.5, 3.5]
    file.close()  # the window that fills no line
    assert [(line["iteration"], line["windows"]) for line in windows(file.path)] == [(10, 2), (20, 2), (25, 1)]


def test_the_file_does_not_grow(tmp_path):
    path = tmp_path / "s.jsonl"
    write(path, 7)
    size = path.stat().st_size
    write(path, 1000).close()
    lines = windows(path)
    assert 4 <= len(lines) <= 8
    assert path.stat().st_size < 1.5 * size
    assert sum(line["windows"] for line in lines) == 1000
    assert lines[-1]["iteration"] == 5000
    assert len({line["windows"] for line in lines[:-1]}) == 1  # a column of the heat map is as wide as the others


def test_a_resume_drops_what_is_done_again(tmp_path):
    path = tmp_path / "s.jsonl"
    write(path, 6)
    with path.open("a") as file:
        file.write('{"iteration": 35, "sco')  # killed here
    write(path, 1, attempt=2, resumed_at=20)
    assert [(line["iteration"], line["attempt"]) for line in windows(path)] == [
        (5, 1),
        (10, 1),
        (15, 1),
        (20, 1),
        (25, 2),
    ]


def test_attempts_on_other_nodes_are_not_joined(tmp_path):
    path = tmp_path / "s.jsonl"
    write(path, 3, lines=4)
    write(path, 1, attempt=2, resumed_at=15, nodes=("n1", "n4"), lines=4)
    assert heads(path) == [{"attempt": 1, "nodes": ["n1", "n2"]}, {"attempt": 2, "nodes": ["n1", "n4"]}]
    assert [(line["attempt"], line["windows"]) for line in windows(path)] == [(1, 2), (1, 1), (2, 1)]
