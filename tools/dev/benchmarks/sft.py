"""``mq bench sft``: fine-tuning on real conversations, tokens a second against TRL's SFTTrainer."""

import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from megatron_qwen.data.token_files.token_set import TokenSet
from tools.dev.benchmarks.chat_prepare import qwen_template, talks
from tools.dev.benchmarks.rows import BenchmarkRow
from tools.dev.benchmarks.sft_workers import BATCH, SEQUENCE
from tools.dev.benchmarks.train_step_workers import bench_config
from tools.dev.benchmarks.turns import Worker, comparison, in_turns

_WORKERS = "tools.dev.benchmarks.sft_workers"
_MQ = Path(__file__).resolve().parents[3] / "mq"
# Of so many lines 45 are no longer than a row, and fill 16 rows of both sides: whole steps.
_CONVERSATIONS, _REQUIRED = 62, 1.4
_OF_PEER = {"bfd": "packed by best fit", "none": "not packed, batches by length"}


def run(*, rounds: int) -> list[BenchmarkRow]:
    """Whole epochs of both sides in turn; of TRL's ways to batch the faster counts.

    Args:
        rounds: epochs of each side that count, after one that does not.
    """
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        prefix = _prepare(Path(folder))
        tokens = TokenSet(prefix).num_tokens
        found = []
        for packing, told in _OF_PEER.items():
            sides = [
                Worker(_WORKERS, [side, str(prefix), kind, str(threads)], threads=threads)
                for side, kind in (("ours", str(BATCH)), ("trl", packing))
            ]
            found.append((told, in_turns(sides[0], sides[1], rounds=rounds, calls=1)))
    told, seconds = min(found, key=lambda one: statistics.median(one[1][1]))
    return [
        comparison(
            "sft fp32",
            seconds,
            tokens=tokens,
            peer=f"TRL's SFTTrainer, {told}",
            required=_REQUIRED,
            conditions=f"{threads} threads, {rounds} epochs of {tokens:,} tokens in rows of {SEQUENCE}",
        )
    ]


def _prepare(root: Path) -> Path:
    """Real conversations as token files; the tokenizer is beside them."""
    lines = [
        [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(turns)] for turns in talks()
    ]
    (root / "text.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(turn["content"] for turn in turns)}) + "\n" for turns in lines)
    )
    chats = "".join(json.dumps({"messages": turns}) + "\n" for turns in lines[:_CONVERSATIONS])
    (root / "chats.jsonl").write_text(chats)
    size = str(bench_config("fp32").model.vocab_size)
    _run("tokenizer", "train", "--vocab-size", size, "--output", root / "tok", root / "text.jsonl")
    (root / "tok" / "chat_template.jinja").write_text(qwen_template())
    words = ("prepare", "--chat", "--tokenizer", root / "tok", "--max-tokens", str(SEQUENCE), "--output")
    _run(*words, root / "chats", root / "chats.jsonl")
    return root / "chats"


def _run(*words: object) -> None:
    subprocess.run([_MQ, "data", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
