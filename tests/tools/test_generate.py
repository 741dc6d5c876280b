"""`mq generate` says what it lacks."""

import sys

import pytest

from megatron_qwen.errors import ConversionError
from tools.generate import main


def test_without_transformers(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConversionError, match=r"needs transformers: pip install 'megatron_qwen\[hf\]'"):
        main([str(tmp_path), "--prompt", "x"])
