"""A Hugging Face directory to be broken."""

import shutil

import pytest

from tests.checkpoints_convert.models import make


@pytest.fixture(scope="module")
def hf_source(tmp_path_factory):
    return make("qwen2 odd", tmp_path_factory.mktemp("hf") / "hf", max_shard_size="60KB")


@pytest.fixture
def hf(hf_source, tmp_path):
    shutil.copytree(hf_source, tmp_path / "hf")
    return tmp_path / "hf"
