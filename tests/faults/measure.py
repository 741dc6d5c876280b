"""Puts deliberate faults into a copy of the tree, one after the other, and says which test notices each.

python -m tests.faults.measure --output faults.jsonl        every fault that the file has no line for
python -m tests.faults.measure --output again.jsonl F07     one of them; --whole runs the whole suite where needed
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

_ROOT = Path(__file__).resolve().parents[2]
_LIST = Path(__file__).with_name("faults.yaml")
_FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", re.MULTILINE)
_LIMIT_S = 3600  # the whole suite, where a fault makes tests wait for their time limits
# What a shell may have set and would have every process compile all modules anew.
_NOT_PASSED_ON = ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED")


@dataclass(frozen=True)
class Fault:
    """A fault of the list.

    Args:
        name: F01 for the first.
        wrong: what is wrong then.
        file: where it is.
        old: text that is in the file once.
        new: what stands in its place.
        tests: test files to try first.
    """

    name: str
    wrong: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What the tests said to a fault.

    Args:
        name: of the fault.
        noticed_by: the first test that fails with the fault and passes without; None if there is none.
        seconds: that it took.
    """

    name: str
    noticed_by: str | None
    seconds: float


def faults() -> list[Fault]:
    """The list, in order."""
    content = yaml.safe_load(_LIST.read_text())
    return [
        Fault(f"F{number:02}", **{**item, "tests": tuple(item["tests"])})
        for number, item in enumerate(content, start=1)
    ]


def copy_tree(target: Path) -> None:
    """Copies the files that git knows or would."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=_ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (_ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(_ROOT / name, target / name)
    for command in (["git", "init", "-q"], ["git", "add", "-A"]):
        subprocess.run(command, cwd=target, check=True)


def failing(tree: Path, tests: list[str], *, without: Sequence[str] = ()) -> str | None:
    """The first test that fails, or None.

    Args:
        tree: the copy.
        tests: files or tests to run; all if there is none.
        without: tests to leave out.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
    environment |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true"}
    spread = ["-n", "auto"] if not tests else ["-n", "0"]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", *spread, *tests]
    command += [f"--deselect={name}" for name in without]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(command)} took longer than {_LIMIT_S} s") from None
    found = _FAILED.search(done.stdout)
    if found is None and done.returncode not in (0, 5):
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr}")
    return found[1] if found else None


def measure(fault: Fault, tree: Path, *, whole: bool) -> Answer:
    """Tries the fault's own test files, then, where ``whole``, all tests."""
    started, path = time.monotonic(), tree / fault.file
    right, noticed = path.read_text(), None
    broken: list[str] = []  # fail without the fault as well
    for tests in [list(fault.tests), *([[]] if whole else [])]:
        while noticed is None:
            path.write_text(right.replace(fault.old, fault.new))
            try:
                found = failing(tree, tests, without=broken)
            finally:
                path.write_text(right)
            if found is None:
                break
            if failing(tree, [found]) is None:
                noticed = found
            else:
                broken.append(found)
    return Answer(fault.name, noticed, round(time.monotonic() - started, 1))


def main() -> int:
    """Prints and notes an answer for each fault; 1 if one went unnoticed."""
    parser = argparse.ArgumentParser("python -m tests.faults.measure")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; faults that have one are left out")
    parser.add_argument("--whole", action="store_true", help="run all tests where a fault's own do not notice it")
    parser.add_argument("names", nargs="*", help="such as F07; all of them by default")
    options = parser.parse_args()
    if unknown := set(options.names) - {fault.name for fault in faults()}:
        parser.error(f"not in faults.yaml: {', '.join(sorted(unknown))}")
    answers = {}
    if options.output.is_file():
        answers = {item["name"]: Answer(**item) for item in map(json.loads, options.output.read_text().splitlines())}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        tree.mkdir()
        copy_tree(tree)
        for fault in faults():
            if fault.name in answers or (options.names and fault.name not in options.names):
                continue
            answers[fault.name] = measure(fault, tree, whole=options.whole)
            with options.output.open("a") as stream:
                stream.write(json.dumps(asdict(answers[fault.name])) + "\n")
            print(f"{fault.name} {answers[fault.name].noticed_by or 'UNNOTICED'}: {fault.wrong}", flush=True)
    return 1 if any(answer.noticed_by is None for answer in answers.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
