"""CSV files of observations, and those that are none."""

import math

import pytest

from megatron_qwen.errors import DataError
from tests.conftest import run
from tests.tools.scaling.studies import Study
from tools.scaling.observations import read_csv, write_csv


def test_comes_back_as_it_was(tmp_path):
    cells = Study(noise=0.01).draw(0)
    write_csv(tmp_path / "study.csv", cells)
    back = read_csv(tmp_path / "study.csv")
    assert len(back) == len(cells)
    for one, other in zip(cells, back, strict=True):
        assert (one.params, one.tokens, one.status, one.learning_rate) == (
            other.params, other.tokens, other.status, other.learning_rate,
        )  # fmt: skip
        assert one.loss == other.loss or (math.isnan(one.loss) and math.isnan(other.loss))


def test_all_wrong_lines_at_once(tmp_path):
    path = tmp_path / "study.csv"
    lines = ["1e8,2e9,3.0,done", "1e8,,3.0,done", "1e8,2e9,nan,done", "-1,2e9,3.0,done", "1e8,2e9,3.0,gone", "x,2e9,3,"]
    path.write_text("params,tokens,loss,status\n" + "\n".join(lines) + "\n")
    with pytest.raises(DataError) as caught:
        read_csv(path)
    said = str(caught.value)
    for number, word in ((3, "tokens"), (4, "loss"), (5, "params"), (6, "status"), (7, "params")):
        assert f"{path}:{number}: {word}" in said
    assert f"{path}:2" not in said


def test_a_diverged_line_needs_no_loss(tmp_path):
    path = tmp_path / "study.csv"
    path.write_text("params,tokens,loss,status\n1e8,2e9,3.0,\n1e8,2e9,nan,diverged\n1e8,2e9,,unfinished\n")
    assert [one.status for one in read_csv(path)] == ["done", "diverged", "unfinished"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"params,tokens\n1,2\n", "lacks the column loss"),
        (b"params,tokens,loss\n", "no line"),
        (b"\xff\xfe\x00", "text"),
    ],
)
def test_no_such_file(content, said, tmp_path):
    (tmp_path / "x.csv").write_bytes(content)
    done = run("launch.sweep", "fit", str(tmp_path / "x.csv"))
    assert done.returncode == 3
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]
