"""Killed at any moment, a preparation goes on where it was and gives the same bytes."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.demo import standard_library
from megatron_qwen.data.token_files.manifest import read_manifest
from tests.conftest import command, environment, run
from tests.processes import kill_points
from tests.tiers import count

MOMENTS = count(quick=2, thorough=20)
ENDINGS = (".bin", ".idx", ".json")


@pytest.fixture(scope="module")
def large_corpus(tmp_path_factory) -> Path:
    """40 MB, in many units."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = "".join(json.dumps(document) + "\n" for document in standard_library(8_000_000))
    path.write_text(lines * 5)
    return path


def start(tokenizer: Path, prefix: Path, corpus: Path, *, kill_before: int | None = None) -> subprocess.Popen:
    """Begins a preparation, to be killed before this call that changes a file's state."""
    arguments = command("tools.data", "prepare", "--tokenizer", tokenizer, "--output", prefix, "--workers", 2, corpus)
    killed = {} if kill_before is None else {kill_points.VARIABLE: str(kill_before)}
    return subprocess.Popen(
        arguments,
        env={**environment(), **killed},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@dataclass(frozen=True)
class Whole:
    """What an undisturbed preparation made, and how long it took."""

    content: list[bytes]
    seconds: float


@pytest.fixture(scope="module")
def whole(large_corpus, tokenizer, tmp_path_factory) -> Whole:
    prefix, started = tmp_path_factory.mktemp("whole") / "whole", time.monotonic()
    assert start(tokenizer, prefix, large_corpus).wait(timeout=120) == 0
    return Whole([prefix.with_name(f"whole{ending}").read_bytes() for ending in ENDINGS], time.monotonic() - started)


def resume(tokenizer: Path, prefix: Path, corpus: Path, whole: Whole) -> bool:
    """The same command gives the same bytes and leaves nothing else; answers whether there were finished parts."""
    with_parts = len(list(prefix.parent.glob("whole.work/*.json"))) > 1
    run("tools.data", "prepare", "--tokenizer", tokenizer, "--output", prefix, corpus, check=True)
    assert [prefix.with_name(f"whole{ending}").read_bytes() for ending in ENDINGS] == whole.content
    assert not prefix.with_name("whole.work").exists()
    return with_parts


def test_between_two_states_of_its_files(large_corpus, tokenizer, whole, tmp_path):
    kills = with_parts = 0
    for number in kill_points.numbers():
        prefix = tmp_path / f"out{number}" / "whole"
        process = start(tokenizer, prefix, large_corpus, kill_before=number)
        if process.wait(timeout=120) == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
        with_parts += resume(tokenizer, prefix, large_corpus, whole)
        shutil.rmtree(prefix.parent)
    print(f"{kills} kills, {with_parts} with finished parts")
    assert kills > 5
    assert with_parts > 0


def test_at_random_moments(large_corpus, tokenizer, whole, tmp_path):
    dice, interrupted = random.Random(20), 0
    for moment in range(6 * MOMENTS):  # some end before they are killed, as the machine is faster than before
        prefix = tmp_path / f"out{moment}" / "whole"
        process = start(tokenizer, prefix, large_corpus)
        time.sleep(whole.seconds * dice.uniform(0.2, 0.9))
        os.killpg(process.pid, signal.SIGKILL)  # the parent and its processes, as when a node goes
        interrupted += process.wait() == -signal.SIGKILL
        resume(tokenizer, prefix, large_corpus, whole)
        shutil.rmtree(prefix.parent)
        if interrupted == MOMENTS:
            break
    assert interrupted == MOMENTS


def test_only_the_parent_is_killed(large_corpus, tokenizer, tmp_path):
    """Its processes end by themselves, and the next attempt is not in their way."""
    process = start(tokenizer, tmp_path / "out", large_corpus)
    children: list[str] = []
    deadline = time.monotonic() + 60
    while not children and time.monotonic() < deadline:
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert children
    process.kill()
    process.wait()
    run("tools.data", "prepare", "--tokenizer", tokenizer, "--output", tmp_path / "out", large_corpus, check=True)
    assert all(not Path(f"/proc/{child}").exists() or _is_gone(child) for child in children)
    assert read_manifest(tmp_path / "out") is not None


def _is_gone(child: str) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_a_worker_that_is_killed_is_named(large_corpus, tokenizer, tmp_path):
    process = subprocess.Popen(
        command("tools.data", "prepare", "--tokenizer", tokenizer, "--output", tmp_path / "out", large_corpus),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    child = ""
    deadline = time.monotonic() + 60
    while not child and time.monotonic() < deadline:
        child = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split("\n")[0]
    os.kill(int(child), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the process that encoded it was killed by signal 9" in error
    assert "Traceback" not in error
    run("tools.data", "prepare", "--tokenizer", tokenizer, "--output", tmp_path / "out", large_corpus, check=True)


def test_two_at_once(large_corpus, tokenizer, tmp_path):
    """One works, the other says so."""
    first = start(tokenizer, tmp_path / "out", large_corpus)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out.work" / "task_0_of_1.lock").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    second = run("tools.data", "prepare", "--tokenizer", tokenizer, "--output", tmp_path / "out", large_corpus)
    assert first.wait(timeout=120) == 0
    assert second.returncode == 2
    assert "another process is preparing this output" in second.stderr


def test_a_changed_input_takes_what_still_fits(large_corpus, tokenizer, tmp_path):
    for name in ("a", "b"):
        lines = large_corpus.read_text().splitlines(keepends=True)[:300]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("broken\n")
    arguments = ["prepare", "--tokenizer", tokenizer, "--output", tmp_path / "out", "--workers", 1]
    done = run("tools.data", *arguments, tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert done.returncode == 3
    assert "b.jsonl:301 = broken" in done.stderr
    lines = (tmp_path / "b.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_text("".join(lines[:-1]))
    run("tools.data", *arguments, tmp_path / "a.jsonl", tmp_path / "b.jsonl", check=True)
    noted = read_manifest(tmp_path / "out")
    assert noted.documents == 600
