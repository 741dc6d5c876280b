"""Fine-tuning on conversations of people, step for step what TRL's SFTTrainer does with the same ids and labels."""

import json
import subprocess
import sys

import chitchat_dataset
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from launch.demo import standard_library
from megatron_qwen.config.source import resolve
from megatron_qwen.data.reading.training_data import TrainingData
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from tests.conftest import ROOT, environment, run
from tests.data.chat.conftest import template
from tests.distributed import jobs
from tests.tiers import count

STEPS, BATCH, LENGTH, RATE = count(quick=10, thorough=100), 4, 512, 1e-3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizer")
    lines = [json.dumps({"text": document["text"]}) + "\n" for document in standard_library(300_000)]
    (root / "text.jsonl").write_text("".join(lines))
    words = ("--vocab-size", 512, "--output", root / "tok", root / "text.jsonl")
    run("tools.data", "tokenizer", "train", *words, check=True)
    (root / "tok" / "chat_template.jinja").write_text(template("qwen2_5"))
    return root / "tok"


@pytest.fixture(scope="module")
def chats(tokenizer, tmp_path_factory):
    """An epoch of conversations, of which no two share a row: each has more than half of a row's tokens."""
    counting = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"))
    counting.chat_template = template("qwen2_5")
    found = []
    for turns in chitchat_dataset.ConversationDataset():
        messages = []
        for at, text in enumerate(text for text in turns if text.strip()):
            messages.append({"role": ("user", "assistant")[at % 2], "content": text})
            length = len(counting.apply_chat_template(messages, return_dict=False)) if at % 2 else 0
            if length > LENGTH // 2:
                if length <= LENGTH:
                    found.append({"messages": messages})
                break
        if len(found) == STEPS * BATCH:
            break
    root = tmp_path_factory.mktemp("chats")
    (root / "chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    words = ("--chat", "--tokenizer", tokenizer, "--output", root / "set", root / "chats.jsonl")
    run("tools.data", "prepare", *words, check=True)
    return root / "set"


def test_losses_are_those_of_trl(chats, tokenizer, pool, tmp_path):
    data = [f"data.path={chats}", f"data.tokenizer={tokenizer}", f"data.seq_length={LENGTH}"]
    # More rows than the tokenizer has: so large an output layer leaves out tokens without loss.
    model = ["model.vocab_size=8192", f"model.max_position_embeddings={LENGTH}"]
    length = [f"training.train_iters={STEPS}", f"training.global_batch_size={BATCH}", "training.eval_iters=0"]
    optim = [f"optim.learning_rate={RATE}", "optim.lr_decay_style=constant", "optim.lr_warmup_iters=0"]
    optim += ["optim.weight_decay=0.1", "optim.clip_grad=1.0", "optim.adam_beta2=0.95", "optim.adam_eps=1e-8"]
    words = ["objective.kind=sft", "training.micro_batch_size=2", *data, *model, *length, *optim]
    config = resolve("tiny_dense", words, RECIPES)
    RunDirectory(tmp_path / "start").claim(config)
    pool[1].run(jobs.train, config, 0, tmp_path / "start" / "checkpoints")
    run("checkpoints_convert.convert", "to-hf", tmp_path / "start", tmp_path / "hf", check=True)
    reader, rows = TrainingData(config).at(0), []
    for number in range(STEPS * BATCH):
        sample = reader[number]
        assert sample.starts.tolist() == [0, LENGTH - sample.padding][: 1 + (sample.padding > 0)]
        ids = sample.tokens[: LENGTH - sample.padding].astype(np.int64)
        labels = np.full_like(ids, -100)
        carried = sample.loss_mask[: len(ids) - 1].astype(bool)
        labels[1:][carried] = ids[1:][carried]
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    spec = {"model": str(tmp_path / "hf"), "tokenizer": str(tokenizer), "out": str(tmp_path / "trl"), "batch": BATCH}
    (tmp_path / "spec.json").write_text(json.dumps(spec | {"rate": RATE, "rows": rows}))
    (tmp_path / "trl").mkdir()
    command = [sys.executable, "-P", "-m", "tests.training.trl_run", str(tmp_path / "spec.json")]
    subprocess.run(command, check=True, cwd=ROOT, env=environment() | {"PYTHONPATH": str(ROOT)}, timeout=500)
    theirs = json.loads((tmp_path / "trl" / "losses.json").read_text())
    config = config.with_section("checkpoint", load=str(tmp_path / "start" / "checkpoints"))
    RunDirectory(tmp_path / "run").claim(config)
    assert pool[2].run(jobs.attempt, config, tmp_path / "run") == [0, 0]
    ours = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(ours) == len(theirs) == STEPS
    print(
        f"{STEPS} steps, losses {ours[0]:.4f} to {ours[-1]:.4f}, largest gap {max(np.abs(np.subtract(ours, theirs)))}"
    )
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] < ours[0] - 0.5
