"""YAML is read by the rules of version 1.2."""

import math

import pytest

from megatron_qwen.config.strict_yaml import read_mapping, read_scalar
from megatron_qwen.errors import ConfigError


def test_scalars(tmp_path):
    (tmp_path / "f.yaml").write_text("a:\nb: ~\nc: 1:30\nd: 0123\ne: 1e-4\nf: 2020-01-01\ng: yes\nh: .inf\ni: ''\n")
    found = read_mapping(tmp_path / "f.yaml")
    assert list(found.values()) == [None, None, "1:30", 123, 1e-4, "2020-01-01", "yes", math.inf, ""]


def test_words_of_a_command_line():
    assert [read_scalar(text) for text in ("", "null", "[1, a]", "1e3")] == ["", None, [1, "a"], 1000.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: 1\na: 2\n", "f.yaml:1: is not valid YAML (duplicate key 'a')."), ("- a\n", "must contain a YAML mapping")],
)
def test_what_is_refused(text, said, tmp_path):
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_mapping(tmp_path / "f.yaml")
    assert said in str(caught.value)
