"""Tables as others write them."""

from pathlib import Path

import pytest

from megatron_qwen.errors import ConfigError, DataError
from tests.conftest import run
from tools.scaling.csv_table import column_names
from tools.scaling.doubts import doubts
from tools.scaling.observations import COLUMNS, Observation, read_csv

ROWS = [("1e8", "2e9", "3.25"), ("2e8", "4e9", "3.0")]


def table(path: Path, header: str, separator: str = ",", *, extra: str = "") -> Path:
    lines = [header, *(separator.join(row) + extra for row in ROWS)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("header", "separator", "columns"),
    [
        ("params,tokens,loss", ",", ""),
        ("Params,TOKENS, Loss ", ",", ""),
        ("params;tokens;loss", ";", ""),
        ("params\ttokens\tloss", "\t", ""),
        ("params|tokens|loss", "|", ""),
        ("\ufeffparams,tokens,loss", ",", ""),
        ("N,D,val_loss", ",", "params=N,tokens=D,loss=val_loss"),
        ("N (no emb.);D;final loss", ";", "params=N (no emb.), tokens=D, loss=final loss"),
        ("N,D,Val_Loss", ",", "params=n,Tokens=d,LOSS=val_loss"),
        ("\n  \nparams;tokens;loss", ";", ""),  # the separator of the first line that has one
    ],
)
def test_separators_cases_and_names(header, separator, columns, tmp_path):
    names = column_names([columns] if columns else [], COLUMNS)
    found = read_csv(table(tmp_path / "t.csv", header, separator), names)
    assert [(one.params, one.tokens, one.loss) for one in found] == [(1e8, 2e9, 3.25), (2e8, 4e9, 3.0)]


def test_a_name_that_is_given_counts_before_the_own(tmp_path):
    """A file may have a column ``loss`` that is the training loss, and another that is meant."""
    path = table(tmp_path / "t.csv", "params,tokens,eval,loss", extra=",9.5")
    assert [one.loss for one in read_csv(path, {"loss": "eval"})] == [3.25, 3.0]
    assert [one.loss for one in read_csv(path)] == [9.5, 9.5]


def test_case_decides_between_columns_that_differ_in_nothing_else(tmp_path):
    path = table(tmp_path / "t.csv", "params,tokens,Eval,eval", extra=",9.5")
    assert [one.loss for one in read_csv(path, {"loss": "Eval"})] == [3.25, 3.0]
    assert [one.loss for one in read_csv(path, {"loss": "eval"})] == [9.5, 9.5]
    with pytest.raises(ConfigError, match=r"EVAL: may be Eval or eval of .*; write it as the file does"):
        read_csv(path, {"loss": "EVAL"})


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["loss=a,loss=b"], "loss=b: gives loss a second time, after loss=a"),
        (["loss=a", "LOSS=a"], "LOSS=a: gives loss a second time"),
        (["loss=a", "params=a"], "params=a: uses the column a a second time"),
    ],
)
def test_a_name_or_a_column_that_is_given_twice(words, told):
    with pytest.raises(ConfigError, match=told):
        column_names(words, COLUMNS)


def test_one_column_under_two_spellings(tmp_path):
    path = table(tmp_path / "t.csv", "N,tokens,loss")
    with pytest.raises(ConfigError, match="n: is already params, and cannot be total_params too"):
        read_csv(path, {"params": "N", "total_params": "n"})


def test_lines_with_more_cells_than_the_header_are_refused(tmp_path):
    """Decimal commas would be read as whole losses."""
    path = tmp_path / "t.csv"
    path.write_text('params,tokens,loss\n1e8,5e8,3,171\n2e8,1e9,3.0\n\n4e8,2e9,2,"9,1",x\n')
    with pytest.raises(DataError) as caught:
        read_csv(path)
    places = [(problem.where, problem.value) for problem in caught.value.problems]
    assert places == [(f"{path}:2", "4 cells"), (f"{path}:5", "5 cells")]
    assert "are more than the 3 of the header" in caught.value.problems[0].fix
    path.write_text("params,tokens,loss,\n1e8,5e8,3,171\n")
    with pytest.raises(DataError, match="4 cells: are more than the 3 of the header"):
        read_csv(path)
    path.write_text("params,tokens,loss\n" + "1e8,5e8,3,171\n" * 25)
    with pytest.raises(DataError, match="and 5 more lines like these"):
        read_csv(path)


def test_empty_cells_beyond_the_header_are_nothing(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("params,tokens,loss\n1e8,5e8,3.171,, \n,,,\n2e8,1e9,3.0,\n")
    assert [one.loss for one in read_csv(path)] == [3.171, 3.0]


@pytest.mark.parametrize("word", ["loss", "loss=", "los=val", "=x", "weight=w"])
def test_words_that_map_nothing(word):
    with pytest.raises(ConfigError, match="must be NAME=COLUMN with a NAME of params"):
        column_names([word], COLUMNS)


def test_refusals_name_columns(tmp_path):
    path = table(tmp_path / "t.csv", "N,tokens,loss")
    with pytest.raises(DataError, match=r"lacks the column params; .* --columns"):
        read_csv(path)
    with pytest.raises(ConfigError, match="is not a column of"):
        read_csv(path, {"params": "M"})
    with pytest.raises(DataError, match="is the name of two columns"):
        read_csv(table(tmp_path / "u.csv", "Params,params,loss"))
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match="lacks the columns params, tokens, loss"):
        read_csv(tmp_path / "empty.csv")


def test_a_fit_without_a_law_is_refused_and_nothing_follows_from_one(tmp_path):
    path = table(tmp_path / "t.csv", "N;D;L", ";")
    done = run("launch.sweep", "fit", path, "--columns", "params=N,tokens=D,loss=L")
    assert done.returncode == 3
    assert "2 observations: determine no law: " in done.stderr
    assert not (tmp_path / "t.fit.json").exists()


def observations(count: int = 20, **more: float) -> list[Observation]:
    sizes = [1e8 * 2 ** (index % 5) for index in range(count)]
    return [
        Observation(**{"params": size, "tokens": 1e9 + index, "loss": 3.123456 - index / 1000, **more})
        for index, size in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (observations(), []),
        ([*observations(), *observations()[:3]], ["3 lines repeat another"]),
        (observations(60), ["5 sizes have 8 or more token counts each"]),
        ([Observation(1e8, 1e9, 3.12), Observation(2e8, 1e9, 3.1)], ["at most 2 decimals"]),
        (observations(loss=0.912345), ["below 1 nat"]),
        ([*observations(), Observation(1e8, 1e9, 24.123)], ["above 12 nats"]),
        ([Observation(1e8, 1e9, 24.123, status="diverged"), *observations()], []),
    ],
)
def test_what_makes_intervals_wrong_is_said(lines, told):
    found = list(doubts(lines))
    assert len(found) == len(told), found
    for text, words in zip(found, told, strict=True):
        assert words in text
