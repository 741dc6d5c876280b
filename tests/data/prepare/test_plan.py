"""By what a preparation recognises its own earlier work."""

import os

import pytest

from megatron_qwen.data.prepare.plan import make_plan
from megatron_qwen.data.text.blocks import ReadOptions
from megatron_qwen.data.text.inputs import find_inputs


@pytest.fixture
def keys(tmp_path):
    """Keys of the parts of a file of 1,000 bytes in units of 400, with the fingerprint of the whole."""
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"<|endoftext|>": 0}}}')
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"x" * 1000)

    def answer(**options):
        plan = make_plan(
            find_inputs([source]).files,
            tokenizer=tmp_path,
            prefix=tmp_path / "out",
            options=ReadOptions(**options),
            unit_bytes=400,
        )
        return [unit.key for shard in plan.shards for unit in shard.units], plan.fingerprint

    answer.source = source
    return answer


def test_the_same_command_finds_its_parts(keys):
    (first, made_by), (second, again) = keys(), keys()
    assert first == second
    assert made_by == again
    assert len(set(first)) == 3


def test_a_file_that_was_written_again_is_read_again(keys):
    """It has the same name and size: only the time of its last change tells."""
    first, made_by = keys()
    noted = keys.source.stat()
    keys.source.write_bytes(b"y" * 1000)
    os.utime(keys.source, ns=(noted.st_atime_ns, noted.st_mtime_ns + 1_000_000))
    second, other = keys()
    assert not set(first) & set(second)
    assert made_by != other


def test_other_options_make_other_parts(keys):
    assert not set(keys()[0]) & set(keys(field="body")[0])
