"""Forked workers leave the garbage of their parent alone."""

import gc
import os
import time
from multiprocessing.util import register_after_fork

import pytest

from megatron_qwen.data.clean.job import CleaningStages, clean
from megatron_qwen.data.text.blocks import ReadOptions
from megatron_qwen.data.text.inputs import find_inputs
from tests.data.prepare.test_prepare import TEXTS, make, write_jsonl


class HangsElsewhere:
    """Garbage whose finalizer ends in the process that made it only, as one that joins threads does."""

    def __init__(self) -> None:
        self.itself, self.home = self, os.getpid()

    def __del__(self) -> None:
        while os.getpid() != self.home:
            time.sleep(1)


class Hook:
    """Has every process that is forked while it lives collect garbage at once."""

    def __init__(self) -> None:
        register_after_fork(self, lambda _: gc.collect())


@pytest.fixture
def collecting_forks():
    gc.collect()
    gc.disable()
    HangsElsewhere()
    hook = Hook()
    yield hook
    gc.enable()


def test_preparation(collecting_forks, tokenizer, tmp_path):
    made = make(tokenizer, tmp_path / "all", write_jsonl(tmp_path / "texts.jsonl", TEXTS))
    assert made.documents == len(TEXTS)


def test_cleaning(collecting_forks, tmp_path):
    inputs = find_inputs([write_jsonl(tmp_path / "texts.jsonl", TEXTS)]).files
    report = clean(
        inputs, tmp_path / "out", CleaningStages(exact=True), options=ReadOptions(), skip_bad=False, workers=2
    )
    assert report.read == len(TEXTS)
