"""What all programs do with their command line and their errors."""

import pytest

from megatron_qwen.cli import run_program


def test_words_that_are_not_utf8_are_refused_by_name(monkeypatch, capsys):
    """As a terminal with a Latin-1 locale sends them: Python keeps such a byte as half a surrogate pair."""
    latin1 = b"l\xfcx".decode(errors="surrogateescape")
    monkeypatch.setattr("sys.argv", ["mq", "fine", latin1, f"data.path={latin1}"])
    with pytest.raises(SystemExit) as ended:
        run_program(lambda _: 0)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.count("is not UTF-8 text") == 2
    assert "LC_ALL=C.UTF-8" in told


def test_every_other_word_passes(monkeypatch):
    words = ["lüx", "你好", "\U0001f600", "a b", ""]
    monkeypatch.setattr("sys.argv", ["mq", *words])
    with pytest.raises(SystemExit) as ended:
        run_program(lambda arguments: 0 if arguments == words else 1)
    assert ended.value.code == 0
