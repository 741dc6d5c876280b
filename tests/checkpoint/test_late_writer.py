"""A rank of an attempt that was superseded writes late, at any moment: nothing of it is committed."""

import random
import threading
import time
from pathlib import Path

from megatron_qwen.attempts import AttemptLog
from megatron_qwen.checkpoint import manifest
from megatron_qwen.checkpoint.paths import committed
from megatron_qwen.config.run import RunConfig
from megatron_qwen.recipes.registry import RECIPES
from tests.tiers import count

TRIALS = count(quick=4, thorough=30)


def write_until_followed(config: RunConfig, root: Path) -> int:
    """Saves one checkpoint after the other as the first attempt until it may no longer; answers with how many."""
    from megatron_qwen.checkpoint.write import CheckpointWriter, SaveError
    from megatron_qwen.training.build import build_components
    from megatron_qwen.training.callbacks.checkpointing import Checkpointing

    components = build_components(config)
    attempts = AttemptLog(root.with_name("attempts.jsonl"))
    writer = CheckpointWriter(root, attempt=attempts.newest(), attempts=attempts, keep_last=3, keep_every=None)
    for number in range(1, 400):
        components.progress.iteration = number
        try:
            Checkpointing(writer, saved=0, tokenizer=None).save(components, background=bool(number % 2))
            writer.finish()
        except SaveError as error:
            if "was superseded by a newer attempt and must not commit" not in error.render():
                raise
            return number - 1
    raise AssertionError("nobody followed")


def test_no_bad_checkpoint(pool, tokens, tmp_path):
    config = RECIPES["tiny_dense"]().with_section("data", path=str(tokens))
    moments = random.Random(7)
    caught_in_between = 0
    for trial in range(TRIALS):
        root = tmp_path / f"run_{trial}" / "checkpoints"
        root.mkdir(parents=True)
        attempts = AttemptLog(root.with_name("attempts.jsonl"))
        attempts.begin()
        there: dict[str, list[tuple[int, Path]]] = {}

        def follow(root=root, attempts=attempts, there=there) -> None:
            deadline = time.monotonic() + 60
            while not committed(root) and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(moments.random() * 0.3)
            attempts.begin()
            there["then"] = committed(root)

        thread = threading.Thread(target=follow)
        thread.start()
        written = pool[2].run(write_until_followed, config, root)
        thread.join()
        assert written[0] == written[1]
        # From the moment another attempt had begun nothing was added, taken away or half done.
        assert committed(root) == there["then"]
        newest = committed(root)[0]
        assert newest[0] == written[0]
        assert (root / "latest").read_text().strip() == newest[1].name
        assert all(manifest.damage(path) == [] for _, path in committed(root))
        caught_in_between += bool(list(root.glob(".iter_*")))
    assert caught_in_between == 0, "what was not committed is removed"
