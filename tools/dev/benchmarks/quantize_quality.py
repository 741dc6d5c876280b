"""``mq bench quantize_quality``: perplexity and KL divergence of every format of models that were trained here.

Two models: that of ``mq demo``, and a wider one on the same tokens, whose rows fit groups of 128 and K-quants. Every
release is made by ``mq convert quantize`` with its own method, calibrated on the run's own data, and read back by
``mq convert verify --logits`` on text that neither training nor calibration has seen.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.dev.benchmarks.convert import ROOT
from tools.dev.benchmarks.rows import BenchmarkRow, against_limit

SAFETENSORS_FORMATS = ("gptq-int4", "gptq-int8", "awq-int4", "w4a16", "w8a8", "fp8", "fp8-block")
GGUF_KINDS = ("F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
_WIDER = (
    "model.hidden_size=256",
    "model.ffn_hidden_size=768",
    "model.num_layers=6",
    "parallel.tensor_model_parallel_size=1",
    "parallel.sequence_parallel=false",
    "data.path={demo}/tokens",
    "data.tokenizer={demo}/tokenizer",
)
_SAMPLES = ("--samples", "128", "--sample-length", "256")
# Sources of a package that is not part of the demo's text, the standard library.
_UNSEEN, _PROMPTS, _PROMPT_CHARACTERS = "yaml", 16, 600
# A limit for the rows: perplexity may grow by a tenth. The figures are what the rows are for.
_WORST_PERPLEXITY = 1.1


def run(*, rounds: int) -> list[BenchmarkRow]:
    """Rows for every model and format: perplexity by the original's, with KL and agreement in the conditions.

    Args:
        rounds: not used: nothing here is timed.
    """
    del rounds
    found = []
    with tempfile.TemporaryDirectory(prefix="mq-bench-") as folder:
        demo = Path(folder) / "demo"
        _call("launch.demo", "--output", demo)
        wider = Path(folder) / "wider"
        words = [word.format(demo=demo) for word in _WIDER]
        _call("launch.train", "demo", *words, "--run-dir", wider, "--nproc", 2)
        for name, source, group in (("demo", demo / "run", 64), ("wider", wider, 128)):
            found += _of_model(name, source, Path(folder) / f"out-{name}", group)
    return found


def _of_model(name: str, source: Path, out: Path, group: int) -> list[BenchmarkRow]:
    formats = [one for one in SAFETENSORS_FORMATS if not (group != 128 and one == "fp8-block")]
    kinds = ",".join(GGUF_KINDS)
    words: tuple[object, ...] = ("--format", f"{','.join(formats)},gguf:{kinds}", "--group-size", group, *_SAMPLES)
    _call("checkpoints_convert.convert", "quantize", source, out, *words)
    # Rounding to nearest beside the calibrated ones, and GGUF with importances beside those without.
    nearest = [one for one in formats if not one.startswith("fp8")]
    words = ("--format", ",".join(nearest), "--group-size", group, "--method", "nearest")
    _call("checkpoints_convert.convert", "quantize", source, out.with_name(f"{out.name}-nearest"), *words)
    weighed = ",".join(kind for kind in GGUF_KINDS if kind.endswith("_M") or kind.startswith(("Q2", "Q4_0")))
    importance = out.with_name(f"{out.name}-importance")
    words = ("--format", f"gguf:{weighed}", "--importance", *_SAMPLES)
    _call("checkpoints_convert.convert", "quantize", source, importance, *words)
    releases = [(one, "", out / one) for one in formats]
    releases += [(one, ", nearest", out.with_name(f"{out.name}-nearest") / one) for one in nearest]
    for folder, told in ((out / "gguf", ""), (importance, ", importance matrix")):
        for path in sorted(folder.glob("*.gguf")):
            releases.append((f"gguf:{path.stem.rpartition('-')[2]}", told, path))
    return [_row(name, label, told, source, path) for label, told, path in releases]


def _row(model: str, label: str, told: str, source: Path, release: Path) -> BenchmarkRow:
    prompts = [word for text in _unseen() for word in ("--prompt", text)]
    printed = _call(
        "checkpoints_convert.convert", "verify", source, release, "--logits", "--json", *prompts, ends=(0, 1)
    )
    answer: dict[str, Any] = json.loads(printed)
    logits = answer["logits"]
    bits = answer["sides"][1]["bits_per_weight"]
    conditions = (
        f"{bits:.2f} bits a weight, KL {logits['kl_mean']:.2e} nats, same argmax {logits['top1_agreement']:.2%}, "
        f"perplexity {logits['perplexity']:.3f} and {logits['other_perplexity']:.3f}, {logits['positions']} tokens; "
        f"verify: {'same' if answer['same'] else 'DIFFERENT'}"
    )
    ratio = logits["other_perplexity"] / logits["perplexity"]
    return against_limit(
        f"{model}, {label}{told}", [ratio], limit=_WORST_PERPLEXITY, unit="of its perplexity", conditions=conditions
    )


def _unseen() -> Sequence[str]:
    """The beginnings of source files that the model has not read."""
    folder = Path(sysconfig.get_path("purelib")) / _UNSEEN
    texts = [path.read_text()[:_PROMPT_CHARACTERS] for path in sorted(folder.glob("*.py"))]
    return [text for text in texts if len(text) == _PROMPT_CHARACTERS][:_PROMPTS]


def _call(module: str, *words: object, ends: tuple[int, ...] = (0,)) -> str:
    """Runs a program of this checkout; its output."""
    command = [sys.executable, "-P", "-m", module, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode not in ends:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout
