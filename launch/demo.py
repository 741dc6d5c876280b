"""``mq demo``: the whole job on real text, small, on this machine: nothing prepared, nothing downloaded."""

import hashlib
import html
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_qwen.cli import Parser, run_program
from megatron_qwen.config.checks import require_legal
from megatron_qwen.config.source import resolve
from megatron_qwen.errors import ConfigError, Problem, UserError
from megatron_qwen.metrics.console import duration
from megatron_qwen.recipes.registry import RECIPES
from tools.report import Section, write_report
from tools.run_records import read_metrics

_PROMPTS = ("def __init__(self,", "if __name__ ==", "class Error(")
_TEXT_BYTES = 12_000_000
_STAGES = 7
_LAYOUT_FIELDS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
_AXES = (*_LAYOUT_FIELDS, "dp", "sp")
_LAYOUT = "tp=2"


class DemoStages:
    """Prints what is done and how long it took."""

    def __init__(self) -> None:
        self._number = 0
        self._started = time.monotonic()

    def begin(self, text: str) -> None:
        """Announces the next stage."""
        self._number += 1
        print(f"\n[{self._number}/{_STAGES}] {text}", flush=True)

    def elapsed(self) -> str:
        """Time since the demo began."""
        return duration(time.monotonic() - self._started)


def layout_overrides(words: Sequence[str]) -> tuple[list[str], int]:
    """``tp=2 pp=2 dp=1`` as overrides, and the number of ranks.

    Tensor parallelism brings sequence parallelism along unless ``sp=0`` says no.

    Raises:
        ConfigError: an unknown axis or a size that is no positive number.
    """
    sizes = {"tp": 1, "pp": 1, "cp": 1, "dp": 1}
    for word in words:
        axis, _, value = word.partition("=")
        if axis not in _AXES or not value.isdecimal() or (axis != "sp" and int(value) < 1):
            raise ConfigError(Problem("--layout", word, f"expected AXIS=SIZE with an axis of {', '.join(_AXES)}."))
        sizes[axis] = int(value)
    fields = [f"parallel.{_LAYOUT_FIELDS[axis]}={size}" for axis, size in sizes.items() if axis in _LAYOUT_FIELDS]
    sequence = sizes["tp"] > 1 and sizes.get("sp", 1) > 0
    return [*fields, f"parallel.sequence_parallel={str(sequence).lower()}"], sizes["tp"] * sizes["pp"] * sizes[
        "cp"
    ] * sizes["dp"]


def standard_library(limit_bytes: int) -> Iterator[dict[str, str]]:
    """Sources of the running interpreter's standard library, in an order that depends on their names alone."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in root.rglob("*.py") if not {"site-packages", "__pycache__"} & set(path.parts)]
    taken = 0
    for path in sorted(paths, key=lambda path: hashlib.sha256(str(path.relative_to(root)).encode()).digest()):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # deliberately broken sources of the test suite
        if text.strip():
            taken += len(text)
            yield {"path": str(path.relative_to(root)), "text": text}
        if taken > limit_bytes:
            return


def fresh_directory(wanted: Path) -> Path:
    """``wanted``, or the first of wanted-2, wanted-3, ... that does not exist."""
    number, path = 1, wanted
    while path.exists():
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    return path


def run_module(module: str, *arguments: str, capture: bool = False) -> str:
    """Runs a program of this checkout; ends the demo with its exit code where it fails."""
    command = [sys.executable, "-P", "-m", module, *arguments]
    # The demo is the CPU's: its two ranks would want two GPUs.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


@dataclass(frozen=True)
class Demo:
    """The stages of the demo, each a program of this checkout as a user would call it.

    Args:
        out: the directory everything goes to.
        layout: as typed, for the eye.
        overrides: the configuration, in addition to the recipe ``demo``.
        ranks: how many.
        stages: what announces them.
    """

    out: Path
    layout: str
    overrides: tuple[str, ...]
    ranks: int
    stages: DemoStages

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.out / "run"

    @property
    def hf(self) -> Path:
        """The exported model."""
        return self.run_dir / "hf"

    def prepare(self, vocab_size: int) -> None:
        """Text, tokenizer and token file."""
        corpus, tokenizer = self.out / "corpus.jsonl", str(self.out / "tokenizer")
        self.stages.begin("collect text: the Python standard library's sources")
        with corpus.open("w", encoding="utf-8") as file:
            count = sum(1 for document in standard_library(_TEXT_BYTES) if file.write(json.dumps(document) + "\n"))
        print(f"{count} files, {corpus.stat().st_size / 1e6:.1f} MB")
        self.stages.begin("train a tokenizer")
        size = ("--vocab-size", str(vocab_size))
        run_module("tools.data", "tokenizer", "train", *size, "--output", tokenizer, str(corpus))
        self.stages.begin("turn text into tokens")
        run_module("tools.data", "prepare", "--tokenizer", tokenizer, "--output", str(self.out / "tokens"), str(corpus))

    def pretrain(self) -> None:
        """The run."""
        self.stages.begin(f"pretrain on {self.ranks} ranks ({self.layout})")
        where = ("--run-dir", str(self.run_dir), "--nproc", str(self.ranks))
        run_module("launch.train", "demo", *self.overrides, *where)

    def export(self) -> dict[str, Any]:
        """The Hugging Face directory, and how far its logits are from the checkpoint's."""
        self.stages.begin("export to Hugging Face, and compare its logits with the checkpoint's")
        run_module("checkpoints_convert.convert", "to-hf", str(self.run_dir), str(self.hf), "--dtype", "fp32")
        printed = run_module("checkpoints_convert.agreement", str(self.run_dir), str(self.hf), capture=True)
        agreement: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return agreement

    def generate(self) -> list[dict[str, str]]:
        """Three continuations by the exported model."""
        self.stages.begin("generate from the exported model")
        prompts = [word for prompt in _PROMPTS for word in ("--prompt", prompt)]
        sampling = ("--max-new-tokens", "80", "--temperature", "0.6", "--json")
        samples: list[dict[str, str]] = json.loads(
            run_module("tools.generate", str(self.hf), *prompts, *sampling, capture=True)
        )
        for sample in samples:
            print(f"\n--- {sample['prompt']!r}\n{sample['prompt']}{sample['text']}")
        return samples

    def report(self, agreement: dict[str, Any], samples: list[dict[str, str]]) -> None:
        """The page, and the figures on the terminal."""
        self.stages.begin("report")
        records = read_metrics(self.run_dir / "metrics.jsonl")
        validation = [record["validation_loss"] for record in records if "validation_loss" in record][-1]
        page = self.out / "report.html"
        write_report(self.run_dir, page, sections=[_agreement_section(agreement, validation), _sample_section(samples)])
        for name, value in _figures(agreement, validation):
            print(f"{name:<56}{value}")
        print(f"\nreport  {page}\nmodel   {self.hf}\ndone in {self.stages.elapsed()}")


def main(arguments: Sequence[str]) -> int:
    """Runs the demo."""
    parser = Parser(
        "mq demo",
        description="Text, tokenizer, pretraining on two ranks, checkpoint, Hugging Face export, generated text, "
        "report: the whole job on this machine's CPU in a few minutes. The text is Python's standard library.",
        examples=[
            "mq demo",
            "mq demo --layout pp=2",
            "mq demo --layout dp=2 --steps 100",
            "mq demo --layout tp=2 pp=2",
        ],
    )
    parser.add_argument("--output", type=Path, default=Path("demo-run"), help="directory to make (%(default)s)")
    layout_help = f"{', '.join(_AXES)} ({_LAYOUT})"
    parser.add_argument("--layout", nargs="+", default=[_LAYOUT], metavar="AXIS=SIZE", help=layout_help)
    parser.add_argument("--steps", type=int, help="number of optimizer steps; default: the recipe's")
    options = parser.parse_args(arguments)
    layout, ranks = layout_overrides(options.layout)
    out = fresh_directory(options.output.absolute())
    overrides = [*layout, f"data.path={out / 'tokens'}", f"data.tokenizer={out / 'tokenizer'}"]
    if options.steps is not None:
        overrides += [
            f"training.train_iters={options.steps}",
            f"optim.lr_wsd_decay_iters={max(1, options.steps // 4)}",
            f"optim.lr_warmup_iters={min(30, options.steps // 4)}",
        ]
    config = resolve("demo", overrides, RECIPES)
    require_legal(config, world_size=ranks)
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise UserError(Problem("--output", out, f"cannot be made ({error.strerror}).")) from None
    demo = Demo(out, " ".join(options.layout), tuple(overrides), ranks, DemoStages())
    demo.prepare(config.model.vocab_size)
    demo.pretrain()
    agreement = demo.export()
    demo.report(agreement, demo.generate())
    return 0


def _figures(agreement: dict[str, Any], validation: float) -> list[tuple[str, str]]:
    return [
        ("validation loss, nats per token", f"{validation:.4f}"),
        ("unigram entropy of the same tokens", f"{agreement['unigram_entropy']:.4f}"),
        (
            "loss, Megatron checkpoint / Hugging Face export",
            f"{agreement['checkpoint_loss']:.6f} / {agreement['hf_loss']:.6f}",
        ),
        ("largest difference of a logit between the two", f"{agreement['max_abs_logit_difference']:.2e}"),
        ("positions where both have the same argmax token", f"{agreement['top1_agreement']:.2%}"),
    ]


def _agreement_section(agreement: dict[str, Any], validation: float) -> Section:
    rows = _figures(agreement, validation)
    body = "".join(f"<tr><td>{html.escape(name)}</td><td>{value}</td></tr>" for name, value in rows)
    return Section("Exported model against the checkpoint", f"<table>{body}</table>")


def _sample_section(samples: list[dict[str, str]]) -> Section:
    body = "".join(
        f"<pre><mark>{html.escape(item['prompt'])}</mark>{html.escape(item['text'])}</pre>" for item in samples
    )
    return Section("Generated text", body)


if __name__ == "__main__":
    run_program(main)
