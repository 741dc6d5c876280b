"""A conversion that is killed goes on with the same command and ends with the same bytes."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from checkpoints_convert.from_hf import ImportOptions, convert
from megatron_qwen.errors import CheckpointError, DiskFullError
from tests.checkpoints_convert.big import SHARD_BYTES, big_model
from tests.conftest import command, environment, small_disk
from tests.processes import kill_points
from tests.tiers import THOROUGH, count

KILLS = count(quick=2, thorough=15)  # of each direction, at random moments


def start(*words: object, kill_before: int | None = None) -> subprocess.Popen[bytes]:
    """Begins ``mq convert``.

    Args:
        words: its arguments.
        kill_before: number of the call that changes a file's state before which it is killed.
    """
    killed = {} if kill_before is None else {kill_points.VARIABLE: str(kill_before)}
    return subprocess.Popen(
        command("checkpoints_convert.convert", *words),
        env={**environment(), **killed},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def hashes(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Hugging Face directory of 12 shards, and the checkpoint made of it."""
    root = tmp_path_factory.mktemp("source")
    big_model(root / "hf")
    convert(root / "hf", root / "checkpoint", ImportOptions(quiet=True, max_shard_bytes=SHARD_BYTES))
    return root


COMMANDS = {
    "to-hf": lambda root, out: ("to-hf", root / "checkpoint", out, "--max-shard-size", SHARD_BYTES / 1e9, "--json"),
    "from-hf": lambda root, out: ("from-hf", root / "hf", out, "--max-shard-size", SHARD_BYTES / 1e9, "--json"),
}


@pytest.fixture(scope="module", params=COMMANDS)
def conversion(request, source, tmp_path_factory):
    """A conversion in one direction: its command line, where it goes, its answer and the bytes it makes."""
    out = tmp_path_factory.mktemp("conversion") / "out"
    words = COMMANDS[request.param](source, out)
    answer = json.loads(start(*words).communicate(timeout=120)[0])
    assert answer["kept_bytes"] == 0
    expected = hashes(out)
    assert len(expected) > 12
    shutil.rmtree(out)
    return Conversion(words, out, answer, expected)


@dataclass(frozen=True)
class Conversion:
    """See the fixture."""

    words: tuple[object, ...]
    out: Path
    answer: dict[str, Any]
    expected: dict[str, str]

    def resume(self) -> int:
        """The same command after a kill gives the same bytes; answers with those of tensors that it kept."""
        written = unfinished_bytes(self.out.parent)
        assert not self.out.exists() or hashes(self.out).items() >= self.expected.items()
        again = start(*self.words)
        answer = json.loads(again.communicate(timeout=120)[0])
        assert again.returncode == 0
        assert hashes(self.out) == self.expected
        assert not list(self.out.parent.glob(".out*")), "something is left beside the directory"
        # What was on the disk and is written again: under one shard.
        repeated = written - answer["kept_bytes"]
        assert repeated < SHARD_BYTES, f"{repeated} bytes of {written} were thrown away"
        shutil.rmtree(self.out)
        return int(answer["kept_bytes"])


def test_killed_between_two_states_of_its_files(conversion):
    if conversion.words[0] == "from-hf" and not THOROUGH:
        pytest.skip("thorough tier: in every run to-hf, which has as many kinds of state")
    kept = []
    for number in kill_points.numbers():
        process = start(*conversion.words, kill_before=number)
        process.communicate(timeout=120)
        if process.returncode == 0:
            shutil.rmtree(conversion.out)
            break
        assert process.returncode == -signal.SIGKILL
        kept.append(conversion.resume())
    print(f"{len(kept)} kills, the same bytes each time; kept in between: {kept}")
    assert len(kept) > 5
    assert any(0 < size < conversion.answer["weight_bytes"] for size in kept), "no kill fell into the writing"


def test_killed_at_random_moments(conversion):
    dice, killed = random.Random(11), 0
    while killed < KILLS:
        process = start(*conversion.words)
        # From when it begins to write, for as long as that took; before, there is nothing to lose.
        while process.poll() is None and not conversion.out.with_name(".out.partial").exists():
            time.sleep(0.001)
        time.sleep(conversion.answer["seconds"] * dice.uniform(0, 1.1))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            shutil.rmtree(conversion.out)
            continue
        killed += 1
        conversion.resume()


def unfinished_bytes(folder: Path) -> int:
    """Bytes of tensors that an unfinished conversion has on the disk; 0 where it is done."""
    shards = [*folder.glob(".out.partial/**/*.safetensors"), *folder.glob(".out.partial/**/*.distcp")]
    return sum(path.stat().st_size for path in shards)


def test_what_is_found_is_checked_again(source, tmp_path):
    """A byte that changed between two attempts is not kept."""
    words = COMMANDS["to-hf"](source, tmp_path / "out")
    assert start(*words).wait(120) == 0
    expected = hashes(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    process = start(*words)
    partial = tmp_path / ".out.partial"
    while process.poll() is None and sum(1 for _ in partial.glob("*.safetensors")) < 4:
        time.sleep(0.005)
    process.kill()
    process.wait()
    shards = sorted(partial.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    assert shards, "it was done before it could be killed"
    with shards[-1].open("r+b") as file:
        file.seek(shards[-1].stat().st_size // 3)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    journal = next((partial / ".journal").glob("*.safetensors"))
    journal.write_text(journal.read_text()[:-7])  # a line that was cut off
    assert start(*words).wait(120) == 0
    assert hashes(tmp_path / "out") == expected


def test_the_same_command_after_the_end_is_done_at_once(source, tmp_path):
    words = COMMANDS["to-hf"](source, tmp_path / "out")
    assert start(*words).wait(120) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = start(*words)
    assert json.loads(again.communicate()[0])["complete_before"]
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    shard = next((tmp_path / "out").glob("*.safetensors"))
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert start(*words).wait() == 3


def test_two_at_once(source, tmp_path):
    words = COMMANDS["from-hf"](source, tmp_path / "out")
    first, second = start(*words), start(*words)
    codes = sorted((first.wait(120), second.wait(120)))
    assert codes in ([0, 3], [0, 0])  # the second may come when the first is done
    assert (tmp_path / "out" / "run.yaml").is_file()


def test_another_unfinished_conversion_is_not_thrown_away(source, tmp_path):
    process = start(*COMMANDS["to-hf"](source, tmp_path / "out"))
    partial = tmp_path / ".out.partial"
    while process.poll() is None and not list(partial.glob("*.safetensors")):
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert partial.is_dir(), "it was done before it could be killed"
    other = [*COMMANDS["to-hf"](source, tmp_path / "out"), "--dtype", "fp32"]
    done = subprocess.run(
        command("checkpoints_convert.convert", *other), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 3
    assert "--restart" in done.stderr
    assert partial.is_dir()
    assert start(*other, "--restart").wait(120) == 0
    assert not partial.exists()


def test_a_full_disk_is_foreseen(source, tmp_path, monkeypatch):
    from checkpoints_convert import work

    monkeypatch.setattr(work, "free_bytes", lambda path: 1_000_000)
    with pytest.raises(DiskFullError, match=r"bytes .* are needed and 1,000,000 are free"):
        convert(source / "hf", tmp_path / "out", ImportOptions(quiet=True))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.distcp"))


@pytest.fixture(name="small_disk")
def disk(tmp_path):
    """A file system of 50 MB, half of what the model needs."""
    with small_disk(tmp_path / "disk", "50m") as mount:
        yield mount


def test_a_disk_that_fills_up_leaves_what_can_be_gone_on_with(source, small_disk, monkeypatch):
    """Others write too: what was free at the start may not be free later."""
    from checkpoints_convert import work

    with monkeypatch.context() as patched:
        patched.setattr(work, "free_bytes", lambda path: 1 << 40)
        with pytest.raises(DiskFullError, match=r"[0-9,]+ bytes .* more are needed.*run the same command again"):
            convert(source / "hf", small_disk / "out", ImportOptions(quiet=True, max_shard_bytes=SHARD_BYTES))
    assert not (small_disk / "out").exists()
    assert list(small_disk.glob(".out.partial/**/*.distcp"))
    subprocess.run(["mount", "-o", "remount,size=900m", small_disk], check=True)
    done = convert(source / "hf", small_disk / "out", ImportOptions(quiet=True, max_shard_bytes=SHARD_BYTES))
    assert done.kept_bytes > done.weight_bytes // 4
    shards = {path.name: path.read_bytes() for path in (small_disk / "out").rglob("*.distcp")}
    assert shards == {path.name: path.read_bytes() for path in (source / "checkpoint").rglob("*.distcp")}


def unfinished(words: tuple[object, ...], folder: Path) -> None:
    """Kills a conversion in the midst of writing."""
    process = start(*words)
    while process.poll() is None and sum(1 for _ in folder.glob(".out.partial/*.safetensors")) < 3:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert (folder / ".out.partial").is_dir(), "it was done before it could be killed"


def test_a_foreign_source_that_changed_meanwhile_is_noticed(source, tmp_path):
    """No manifest tells of it: size and time of every file are part of what the work is known by."""
    foreign = tmp_path / "iter_0000000"
    shutil.copytree(source / "checkpoint" / "checkpoints" / "iter_0000000", foreign)
    config = tmp_path / "run.yaml"
    config.write_text((foreign / "run.yaml").read_text())
    for name in ("manifest.json", "run.yaml", "state.json"):
        (foreign / name).unlink()
    words = ("to-hf", foreign, tmp_path / "out", "--config", config, "--max-shard-size", "20MB", "--json")
    unfinished(words, tmp_path)
    shard = sorted(foreign.glob("*.distcp"))[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    assert start(*words).wait(120) == 3


def test_what_was_not_checked_is_checked_when_it_is_asked_for(finished_run, tmp_path):
    """An attempt with --check weights must not spare the next one the rest."""
    from checkpoints_convert import released_directory, to_hf
    from checkpoints_convert.checkpoint_source import open_checkpoint
    from megatron_qwen.checkpoint.metadata import read_metadata

    shutil.copytree(finished_run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "iter_0000008"
    stored = next(info for index, info in read_metadata(checkpoint).storage_data.items() if "exp_avg_sq" in index.fqn)
    data = bytearray((checkpoint / stored.relative_path).read_bytes())
    data[stored.offset + stored.length // 2] ^= 1
    (checkpoint / stored.relative_path).write_bytes(bytes(data))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(released_directory, "write_manifest", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            to_hf.export(
                open_checkpoint(checkpoint), tmp_path / "out", to_hf.ExportOptions(check_everything=False, quiet=True)
            )
    assert (tmp_path / ".out.partial").is_dir()
    with pytest.raises(CheckpointError, match="damaged"):
        to_hf.export(open_checkpoint(checkpoint), tmp_path / "out", to_hf.ExportOptions(quiet=True))


def test_a_finished_checkpoint_that_lost_a_file_is_not_complete(source, tmp_path):
    words = COMMANDS["from-hf"](source, tmp_path / "out")
    assert start(*words).wait(120) == 0
    (tmp_path / "out" / "run.yaml").unlink()
    assert start(*words).wait(120) == 3
