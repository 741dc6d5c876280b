"""The commit protocol under trouble: stale attempts, background saves, full disks."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.checkpoint import find, manifest
from megatron_qwen.checkpoint.paths import committed, iteration_dir
from megatron_qwen.config.run import RunConfig
from megatron_qwen.recipes.registry import RECIPES
from tests.conftest import small_disk
from tests.distributed import jobs


@pytest.fixture
def config(tokens) -> RunConfig:
    return RECIPES["tiny_dense"]().with_section("data", path=str(tokens))


def save_as(config: RunConfig, root: Path, log: type[AttemptLog] = AttemptLog) -> str:
    """Saves as the third attempt at a run; answers with the error."""
    from megatron_qwen.checkpoint.write import CheckpointWriter, SaveError
    from megatron_qwen.training.build import build_components
    from megatron_qwen.training.callbacks.checkpointing import Checkpointing

    components = build_components(config)
    components.progress.iteration = 7
    attempts = log(attempts_beside(root).path)
    writer = CheckpointWriter(root, attempt=3, attempts=attempts, keep_last=2, keep_every=None)
    try:
        Checkpointing(writer, saved=0, tokenizer=None).save(components, background=False)
    except SaveError as error:
        return error.render()
    return ""


def attempts_beside(root: Path) -> AttemptLog:
    """The attempts of the run whose checkpoints lie in ``root``."""
    return AttemptLog(root.with_name("attempts.jsonl"))


def test_a_stale_attempt_commits_nothing(pool, config, tmp_path):
    root = tmp_path / "checkpoints"
    for _ in range(4):
        attempts_beside(root).begin()
    messages = pool[2].run(save_as, config, root)
    assert all("attempt 3 was superseded by a newer attempt" in message for message in messages)
    assert list(root.iterdir()) == [], "it left something behind"


class Followed(AttemptLog):
    """A log in which another attempt begins before its lock is held."""

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        AttemptLog(self.path).begin()
        with super().exclusive():
            yield


def test_an_attempt_that_is_followed_between_check_and_lock_commits_nothing(pool, config, tmp_path):
    root = tmp_path / "checkpoints"
    for _ in range(3):
        attempts_beside(root).begin()
    messages = pool[2].run(save_as, config, root, Followed)
    assert all("attempt 3 was superseded by a newer attempt" in message for message in messages)
    assert list(root.iterdir()) == [], "it left something behind"


def test_a_current_attempt_commits(pool, config, tmp_path):
    root = tmp_path / "checkpoints"
    for _ in range(3):
        attempts_beside(root).begin()
    assert pool[2].run(save_as, config, root) == ["", ""]
    assert [path.name for path in sorted(root.iterdir())] == ["iter_0000007", "latest"]
    assert (root / "latest").read_text() == "iter_0000007\n"
    assert manifest.damage(iteration_dir(root, 7)) == []


def save_in_background(config: RunConfig, root: Path) -> dict[str, Any]:
    """Saves at step 2 in the background, trains on while it is written, and commits it later."""
    from megatron_qwen.checkpoint.write import CheckpointWriter
    from megatron_qwen.training.build import build_components
    from megatron_qwen.training.callbacks.checkpointing import Checkpointing

    components = build_components(config)
    writer = CheckpointWriter(root, attempt=0, attempts=attempts_beside(root), keep_last=2, keep_every=None)
    for _ in range(2):
        jobs.step(components)
    Checkpointing(writer, saved=0, tokenizer=None).save(components, background=True)
    before = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
    for _ in range(2):
        jobs.step(components)
    writer.finish()
    return {"committed before": before}


def test_a_background_save_holds_the_step_it_was_asked_at(pool, config, tmp_path):
    answers = pool[2].run(save_in_background, config, tmp_path / "background")
    assert answers[0] == {"committed before": []}
    pool[2].run(jobs.train, config, 2, tmp_path / "plain")
    assert jobs.tensor_hashes(find.resolve(tmp_path / "background")[0].path) == jobs.tensor_hashes(
        find.resolve(tmp_path / "plain")[0].path
    )


@pytest.fixture(name="small_disk")
def disk(tmp_path):
    """A file system of a few megabytes."""
    with small_disk(tmp_path / "disk", "16m") as mount:
        yield mount


LATE = {".metadata", "metadata.json", "manifest.json"}


def save_twice(config: RunConfig, root: Path, bytes_left: int | None) -> str:
    """A step, a checkpoint, then another with only so many bytes left on the disk; answers with the error."""
    import torch.distributed as dist

    from megatron_qwen.checkpoint.write import SaveError
    from megatron_qwen.training.build import build_components

    components = build_components(config)
    jobs.step(components)
    jobs.save(components, root)
    if dist.get_rank() == 0:
        if bytes_left is None:  # room for the shards, none for what rank 0 writes when all have written
            shards = [path.stat().st_size for path in root.glob("iter_*/*") if path.name not in LATE]
            bytes_left = sum(-(-size // 4096) * 4096 for size in shards) + 4096
        free = shutil.disk_usage(root).free
        (root.parent / "ballast").write_bytes(bytes(free - bytes_left))
    jobs.step(components)
    try:
        jobs.save(components, root)
    except SaveError as error:
        return error.render()
    return ""


@pytest.mark.parametrize("bytes_left", [0, 4096, 60_000, 500_000, 1_500_000, 2_500_000, None])
def test_a_full_disk_loses_nothing(bytes_left, pool, config, small_disk):
    root = small_disk / "checkpoints"
    messages = pool[2].run(save_twice, config, root, bytes_left)
    assert messages[0] == messages[1]
    assert "No space left on device" in messages[0]
    assert "MiB are free. Free some space" in messages[0]
    assert "Earlier checkpoints are untouched" in messages[0]
    assert [iteration for iteration, _ in committed(root)] == [1]
    assert find.newest_good(find.resolve(root), strict=True).iteration == 1
    assert sorted(path.name for path in root.iterdir()) == ["iter_0000001", "latest"]
