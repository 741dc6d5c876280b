"""Calibration data: which ids, always the same ones, and errors that say what to do."""

import gzip
import json
import shutil

import numpy as np
import pytest
import torch

from checkpoints_convert.checkpoint_source import open_checkpoint
from checkpoints_convert.quantize.calibration_data import (
    SampleChoice,
    Samples,
    from_chats,
    from_run,
    from_texts,
    from_token_files,
)
from megatron_qwen.data.reading.replay import Replay
from megatron_qwen.data.token_files.token_set import TokenSet
from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer
from megatron_qwen.errors import DataError

SMALL = SampleChoice(count=6, length=32)
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
)


def test_default_size():
    assert SampleChoice().tokens == 512 * 2048


def test_token_files(tokens):
    whole = TokenSet(tokens)
    found = from_token_files(tokens, SMALL)
    stream = whole.tokens(0, whole.num_tokens)
    windows = stream[: len(stream) // 32 * 32].reshape(-1, 32)
    places = [int(np.flatnonzero((windows == row).all(1))[0]) for row in found.ids.numpy()]
    assert len(set(places)) == 6
    assert found.ids.dtype == torch.int64


def test_seed_and_digest(tokens):
    first, again = from_token_files(tokens, SMALL), from_token_files(tokens, SMALL)
    other = from_token_files(tokens, SampleChoice(count=6, length=32, seed=1))
    assert torch.equal(first.ids, again.ids)
    assert first.digest == again.digest != other.digest
    # The same ids in another shape are other samples.
    assert Samples(first.ids.view(3, 64), "").digest != first.digest


def test_too_few_tokens_says_how_many_there_are(tokens):
    there = TokenSet(tokens).num_tokens
    with pytest.raises(DataError) as caught:
        from_token_files(tokens, SampleChoice(count=10**6, length=100))
    text = caught.value.render()
    assert f"{there:,} tokens" in text
    assert f"take {there // 100} samples" in text
    with pytest.raises(DataError, match="shorter samples than"):
        from_token_files(tokens, SampleChoice(count=1, length=there + 1))


def test_the_data_of_a_run(finished_run):
    """Samples that the run has read, in its ledger's words, joined and cut."""
    source = open_checkpoint(finished_run)
    ledger = source.state["data"]
    length = ledger["phases"][0]["seq_length"] // 2
    found = from_run(source.config, ledger, SampleChoice(count=5, length=length))
    replay = Replay(source.config, ledger)
    consumed = sum(entry.samples for entry in replay.entries)
    read = np.stack([replay[number][2].tokens for number in range(consumed)])
    halves = {row.tobytes() for row in read.reshape(-1, length)}
    assert all(row.tobytes() in halves for row in found.ids.numpy())
    with pytest.raises(DataError, match="the run has read fewer"):
        from_run(source.config, ledger, SampleChoice(count=10**6, length=length))
    with pytest.raises(DataError, match="does not say what the run has read"):
        from_run(source.config, None, SMALL)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".txt", ".parquet"])
def test_texts(ending, tokenizer, tmp_path):
    texts = [f"Sentence number {number} of a text about bridges and rivers." for number in range(200)]
    path = tmp_path / f"text{ending}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if ending == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.table({"text": texts}), path)
    elif ending == ".txt":
        path.write_text("\n".join(texts))
    else:
        path.write_bytes(gzip.compress(lines.encode()) if ending.endswith("gz") else lines.encode())
    found = from_texts([tmp_path], tokenizer, SMALL)
    encoder = load_tokenizer(tokenizer)
    documents = ["\n".join(texts)] if ending == ".txt" else texts
    stream = [token for text in documents for token in [*encoder.encode_batch([text])[0], encoder.end_of_text]]
    windows = {tuple(stream[at : at + 32]) for at in range(0, len(stream), 32)}
    assert {tuple(row) for row in found.ids.tolist()} <= windows
    assert torch.equal(from_texts([path], tokenizer, SMALL).ids, found.ids)
    with pytest.raises(DataError, match=r"need 320,000.*texts hold fewer.*samples"):
        from_texts([path], tokenizer, SampleChoice(count=10_000, length=32))


@pytest.fixture
def chat_tokenizer(tokenizer, tmp_path):
    shutil.copytree(tokenizer, tmp_path / "tok")
    path = tmp_path / "tok" / "tokenizer_config.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}))
    return tmp_path / "tok"


def test_chats_in_the_template(chat_tokenizer, tmp_path):
    chats = [
        [{"role": "user", "content": f"What is {number} + 1?"}, {"role": "assistant", "content": f"{number + 1}"}]
        for number in range(80)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats) + "\n")
    found = from_chats([path], chat_tokenizer, SMALL)
    encoder = load_tokenizer(chat_tokenizer)
    said = [f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for chat in chats for one in chat]
    stream = [
        token for chat in zip(said[::2], said[1::2], strict=True) for token in encoder.encode_batch(["".join(chat)])[0]
    ]
    windows = {tuple(stream[at : at + 32]) for at in range(0, len(stream), 32)}
    assert {tuple(row) for row in found.ids.tolist()} <= windows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "no conversation"}', 'no "messages"'),
        ('{"messages": "hello"}', 'no "messages"'),
        ('{"messages": [{"content": "hello"}]}', 'no "messages"'),
        ('{"messages": [', "is not JSON"),
    ],
)
def test_records_that_are_no_conversations(line, message, chat_tokenizer, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"chats.jsonl:2: .*{message}"):
        from_chats([path], chat_tokenizer, SMALL)


def test_a_tokenizer_without_template(tokenizer, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    shutil.copytree(tokenizer, tmp_path / "tok")
    (tmp_path / "tok" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(DataError, match="has no chat template"):
        from_chats([path], tmp_path / "tok", SMALL)
    (tmp_path / "chats.txt").write_text("hello")
    with pytest.raises(DataError, match="is not JSON lines"):
        from_chats([tmp_path / "chats.txt"], tmp_path / "tok", SMALL)


def test_ids_that_the_model_does_not_have():
    samples = Samples(torch.tensor([[1, 2], [3, 9]]), "tokens/web")
    samples.require_vocabulary(10)
    with pytest.raises(DataError, match=r"tokens/web = 9: is not among the 9 ids"):
        samples.require_vocabulary(9)
