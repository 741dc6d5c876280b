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
