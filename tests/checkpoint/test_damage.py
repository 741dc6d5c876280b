"""Damage to any file of a checkpoint is found and named, and the checkpoint before it is used."""

import random
import shutil
from pathlib import Path

import pytest

from megatron_qwen.checkpoint import find, manifest
from megatron_qwen.checkpoint.paths import MANIFEST, iteration_dir
from megatron_qwen.errors import CheckpointError, Problem

FLIPS_PER_FILE = 24


@pytest.fixture
def root(finished_run, tmp_path) -> Path:
    shutil.copytree(finished_run / "checkpoints", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def all_files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def flips(path: Path) -> list[tuple[int, int]]:
    """Byte and bit of each flip: first, last, and others."""
    size, choose = path.stat().st_size, random.Random(path.name)
    places = [0, size - 1, *(choose.randrange(size) for _ in range(FLIPS_PER_FILE - 2))]
    return [(place, choose.randrange(8)) for place in places]


def assert_passed_over(root: Path, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    assert find.newest_good(find.resolve(root), strict=False).iteration == 4
    assert path.name in caplog.text, f"{path.name} is not named"
    with pytest.raises(CheckpointError, match=path.name):
        find.newest_good(find.resolve(root), strict=True)


def test_undamaged_is_the_newest(root, caplog):
    assert find.newest_good(find.resolve(root), strict=True).iteration == 8
    assert not caplog.text


@pytest.mark.parametrize("name", [".DS_Store", ".nfs000000", "notes.txt", "._metadata", "README.md", "view/plot.png"])
def test_a_file_that_nothing_reads_is_no_damage(name, root, caplog):
    path = iteration_dir(root, 8) / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("a note")
    assert find.newest_good(find.resolve(root), strict=True).iteration == 8
    assert not caplog.text


@pytest.mark.parametrize("name", ["__9_0.distcp", "more.safetensors", "common.pt", "tokenizer/vocab.json"])
def test_a_file_that_would_be_read_is_damage(name, root, caplog):
    path = iteration_dir(root, 8) / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    assert_passed_over(root, path, caplog)


def test_every_bit_flip_is_found(root, caplog):
    tried = 0
    for path in all_files(iteration_dir(root, 8)):
        content = path.read_bytes()
        for place, bit in flips(path):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            assert_passed_over(root, path, caplog)
            tried += 1
        path.write_bytes(content)
    assert tried >= 6 * FLIPS_PER_FILE
    print(f"{tried} bit flips, all found")


def test_every_truncation_is_found(root, caplog):
    for path in all_files(iteration_dir(root, 8)):
        content = path.read_bytes()
        for length in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            assert_passed_over(root, path, caplog)
        path.write_bytes(content)


def test_a_missing_file_is_found(root, caplog):
    for path in all_files(iteration_dir(root, 8)):
        if path.name != MANIFEST:
            away = path.with_name("away.distcp")
            path.rename(away)
            found = manifest.damage(iteration_dir(root, 8))
            assert [path.name in str(problem) for problem in found].count(True) == 1
            assert any(away.name in str(problem) for problem in found), "an extra shard goes unnoticed"
            away.rename(path)


def test_without_a_manifest_it_was_never_committed(root):
    (iteration_dir(root, 8) / MANIFEST).unlink()
    assert isinstance(manifest.read(iteration_dir(root, 8)), Problem)
    assert find.newest_good(find.resolve(root), strict=False).iteration == 4


def test_nothing_left_is_an_error_that_names_every_bad_file(root):
    for iteration in (4, 8):
        (iteration_dir(root, iteration) / "run.yaml").write_text("recipe: other\n")
    with pytest.raises(CheckpointError) as caught:
        find.newest_good(find.resolve(root), strict=False)
    assert caught.value.exit_code == 4
    assert str(caught.value).count("run.yaml") == 2
