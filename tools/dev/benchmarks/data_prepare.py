"""``mq bench data_prepare``: text to tokens with Qwen's vocabulary, against a stock loop and gigatoken alone."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tools.dev.benchmarks.qwen_vocabulary import qwen_tokenizer
from tools.dev.benchmarks.real_text import write_corpus
from tools.dev.benchmarks.rows import BenchmarkRow, against_limit

_MQ = Path(__file__).resolve().parents[3] / "mq"
_MEGABYTES, _LARGE_BYTES, _DOCUMENT_BYTES = 600, 2 * 10**9, 300 * 10**6
_TIMES_STOCK, _SHARE_OF_RAW, _MOST_GIB = 20.0, 0.7, 1.5
_RAW = """
import sys, time
started = time.perf_counter()
import gigatoken
tokenizer = gigatoken.Tokenizer(sys.argv[1])
encoded = tokenizer.encode_files(gigatoken.JsonlFileSource([sys.argv[2]]))
print(time.perf_counter() - started)
"""


def run(*, rounds: int) -> list[BenchmarkRow]:
    """Whole commands; ours and gigatoken alone take turns, the stock loop runs once."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tokenizer = qwen_tokenizer(root)
        text = root / "text.jsonl"
        size = write_corpus(text, megabytes=_MEGABYTES)
        stock = _stock(text, tokenizer, root / "stock")
        ours_s, raw_s = [], []
        for turn in range(rounds):
            ours_s.append(_ours(text, tokenizer, root / f"text_{turn}"))
            raw_s.append(_raw(text, tokenizer))
            for ending in (".bin", ".idx"):
                ours = root / f"text_{turn}{ending}"
                assert ours.read_bytes() == (root / f"stock{ending}").read_bytes(), f"another {ending} than the stock's"
                ours.unlink()
        return [
            _faster("stock loop, equal bytes", ours_s, [stock] * rounds, size, _TIMES_STOCK),
            _faster("gigatoken alone, nothing written", ours_s, raw_s, size, _SHARE_OF_RAW),
            *_memory(root, text, tokenizer),
        ]


def _faster(peer: str, ours: list[float], theirs: list[float], size: int, required: float) -> BenchmarkRow:
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    speed, other = (size / 1e6 / statistics.median(seconds) for seconds in (ours, theirs))
    return BenchmarkRow(
        "mq data prepare, Qwen's vocabulary",
        speed,
        other,
        "MB/s",
        peer,
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        required,
        f"{os.cpu_count()} cores, {size / 1e6:.0f} MB, {len(ours)} rounds, whole commands",
    )


def _ours(corpus: Path, tokenizer: Path, prefix: Path) -> float:
    started = time.perf_counter()
    command = ["data", "prepare", "--tokenizer", str(tokenizer), "--output", str(prefix), str(corpus)]
    subprocess.run([_MQ, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _stock(corpus: Path, tokenizer: Path, prefix: Path) -> float:
    command = [
        sys.executable,
        "-m",
        "tools.dev.benchmarks.stock_prepare",
        *map(str, (corpus, tokenizer / "tokenizer.json", prefix)),
    ]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.split()[-1])


def _raw(corpus: Path, tokenizer: Path) -> float:
    started = time.perf_counter()
    command = [sys.executable, "-c", _RAW, str(tokenizer / "tokenizer.json"), str(corpus)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _memory(root: Path, text: Path, tokenizer: Path) -> list[BenchmarkRow]:
    """Most memory that all processes of a preparation hold together."""
    large, document = root / "large.jsonl", root / "document.jsonl"
    with large.open("wb") as out:
        content = text.read_bytes()
        while out.tell() < _LARGE_BYTES:
            out.write(content)
    del content
    with document.open("w", encoding="utf-8") as out:
        lines = text.open(encoding="utf-8")
        whole = "".join(json.loads(line)["text"] for line in lines)
        out.write(json.dumps({"text": whole[:_DOCUMENT_BYTES]}, ensure_ascii=False) + "\n")
    del whole
    rows = []
    for name, corpus in (("2 GB of input", large), ("one document of 300 MB", document)):
        peak = peak_gib(["data", "prepare", "--tokenizer", tokenizer, "--output", root / corpus.stem, corpus])
        what = f"memory of mq data prepare, {name}"
        conditions = "peak of all processes' PSS"
        rows.append(against_limit(what, [peak], limit=_MOST_GIB, unit="GiB", conditions=conditions))
    return rows


def peak_gib(words: Sequence[object]) -> float:
    """Most memory that all processes of a command of ``mq`` hold together."""
    command = [str(word) for word in (_MQ, *words)]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        total = 0
        for one in [process, *process.children(recursive=True)]:
            try:
                total += one.memory_full_info().pss
            except psutil.Error:
                continue
        peak = max(peak, total)
        time.sleep(0.02)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak / 2**30
