"""Qwen's own vocabulary, fetched once."""

from pathlib import Path

import pytest

from tools.dev.benchmarks.qwen_vocabulary import fetch_ranks


@pytest.fixture(scope="session")
def qwen_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rank file."""
    return fetch_ranks(tmp_path_factory.mktemp("dashscope"))


@pytest.fixture(scope="session")
def qwen(qwen_ranks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer in Hugging Face form."""
    from tests.conftest import run

    directory = tmp_path_factory.mktemp("qwen") / "tokenizer"
    run("tools.data", "tokenizer", "import-tiktoken", qwen_ranks, "--output", directory, check=True)
    return directory
