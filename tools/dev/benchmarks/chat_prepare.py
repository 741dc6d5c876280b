"""``mq bench chat_prepare``: conversations to token files against transformers' loop, and the memory it takes."""

import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from tools.dev.benchmarks.data_prepare import peak_gib
from tools.dev.benchmarks.qwen_vocabulary import qwen_tokenizer
from tools.dev.benchmarks.rows import BenchmarkRow, against_limit, against_peer

_MQ = Path(__file__).resolve().parents[3] / "mq"
_CONVERSATIONS, _OF_PEER = 1_000_000, 3_000
_TIMES_PEER, _MOST_GIB = 15.0, 1.0
_PEER = """
import json, sys, time
from transformers import PreTrainedTokenizerFast
tokenizer = PreTrainedTokenizerFast(tokenizer_file=sys.argv[1])
tokenizer.chat_template = open(sys.argv[2]).read()
lines = open(sys.argv[3]).read().splitlines()[: int(sys.argv[4])]
started, tokens = time.perf_counter(), []
for line in lines:
    tokens += tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=False)
print(time.perf_counter() - started)
json.dump(tokens, open(sys.argv[5], "w"))
"""


def run(*, rounds: int) -> list[BenchmarkRow]:
    """Whole commands of ours; the peer's loop over some conversations, without its start."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tokenizer = qwen_tokenizer(root)
        (tokenizer / "chat_template.jinja").write_text(qwen_template())
        chats = root / "chats.jsonl"
        size = _write(chats)
        ratios, ours, theirs = [], [], []
        for turn in range(min(rounds, 3)):
            began = time.perf_counter()
            words = ["data", "prepare", "--chat", "--tokenizer", str(tokenizer), "--output", str(root / f"out{turn}")]
            subprocess.run([_MQ, *words, str(chats)], check=True, stdout=subprocess.DEVNULL)
            ours.append(_CONVERSATIONS / (time.perf_counter() - began))
            theirs.append(_OF_PEER / _peer(tokenizer, chats, root / "peer.json"))
            ratios.append(ours[-1] / theirs[-1])
            _require_equal(root / f"out{turn}", root / "peer.json")
            for path in root.glob(f"out{turn}.*"):
                path.unlink()
        told = f"{os.cpu_count()} cores, {_CONVERSATIONS:,} conversations, {size / 1e6:.0f} MB, whole commands"
        words = ["data", "prepare", "--chat", "--tokenizer", str(tokenizer), "--output", str(root / "memory")]
        peak = peak_gib([*words, chats])
        return [
            against_peer(
                "mq data prepare --chat",
                ratios,
                ours=statistics.median(ours),
                against=statistics.median(theirs),
                unit="conversations/s",
                peer=f"transformers' apply_chat_template, one after the other, {_OF_PEER:,} of them, equal ids",
                required=_TIMES_PEER,
                conditions=told,
            ),
            against_limit(
                "memory of mq data prepare --chat",
                [peak],
                limit=_MOST_GIB,
                unit="GiB",
                conditions=f"peak of all processes' PSS, {_CONVERSATIONS:,} conversations",
            ),
        ]


def qwen_template() -> str:
    """Qwen2.5's, as TRL has it."""
    (path,) = (one for one in metadata.files("trl") or () if str(one) == "trl/chat_templates/qwen2_5.jinja")
    return path.read_text()


def talks() -> list[list[str]]:
    """Conversations between people, by turns."""
    module: Any = importlib.import_module("chitchat_dataset")
    found = [[text for text in turns if text.strip()] for turns in module.ConversationDataset()]
    return [turns for turns in found if len(turns) >= 2]


def _write(path: Path) -> int:
    """Parts of 2 to 16 turns of conversations between people, grown to a million; returns the bytes."""
    real = talks()
    dice, roles = random.Random(0), ("user", "assistant")
    with path.open("w", encoding="utf-8") as out:
        for _ in range(_CONVERSATIONS):
            turns = dice.choice(real)
            length = 2 * dice.randint(1, min(8, len(turns) // 2))
            begin = dice.randrange(len(turns) - length + 1)
            messages = [
                {"role": roles[at % 2], "content": text} for at, text in enumerate(turns[begin : begin + length])
            ]
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        return out.tell()


def _peer(tokenizer: Path, chats: Path, out: Path) -> float:
    paths = (tokenizer / "tokenizer.json", tokenizer / "chat_template.jinja", chats, _OF_PEER, out)
    command = [sys.executable, "-c", _PEER, *map(str, paths)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _require_equal(prefix: Path, peer: Path) -> None:
    import numpy as np

    from megatron_qwen.data.token_files.token_set import TokenSet

    expected = json.loads(peer.read_text())
    assert np.array_equal(TokenSet(prefix).tokens(0, len(expected)), expected), "other ids than transformers'"
