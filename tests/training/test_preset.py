"""The preset at work: its choices are logged, what cannot be is refused, and collections keep to their steps."""

import gc
from types import SimpleNamespace

import pytest

from megatron_qwen.estimate import choices
from megatron_qwen.training.callbacks.garbage import GarbageCollection
from tests.conftest import run


def test_every_choice_is_logged_with_its_reason(tokens, tmp_path):
    words = [f"data.path={tokens}", "training.train_iters=1", "optim.lr_warmup_iters=0"]
    done = run("launch.train", "tiny_moe", *words, "--nproc", 2, "--run-dir", tmp_path / "run", check=True)
    lines = [line.split("performance: ", 1)[1] for line in done.stderr.splitlines() if "performance: " in line]
    assert "parallel.overlap_grad_reduce=false: a CPU that sends does not compute" in lines
    assert any(line.startswith("performance.garbage_collection_interval=100: ") for line in lines)
    assert any("cross-entropy" in line for line in lines)
    chosen = [line.partition("=")[0] for line in lines if not line.startswith("output layer")]
    assert chosen == list(choices._RULES)
    asked = (tmp_path / "run" / "checkpoints" / "iter_0000001" / "run.yaml").read_text()
    assert "overlap_grad_reduce: null" in asked  # another machine may choose otherwise


def test_all_that_this_machine_cannot_do_is_said_at_once(tokens, tmp_path):
    forced = ["performance.cuda_graph_impl=local", "performance.moe_token_dispatcher=deepep"]
    done = run("launch.train", "tiny_moe", f"data.path={tokens}", *forced, "--run-dir", tmp_path / "run", gpu=False)
    assert done.returncode == 2
    assert "performance.cuda_graph_impl = local" in done.stderr
    assert "performance.moe_token_dispatcher = deepep" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def python_collects():
    yield
    gc.enable()


def test_collections_keep_to_their_steps(python_collects):
    """Garbage lies until the step that the interval names."""

    class Cycle:
        alive = 0

        def __init__(self) -> None:
            self.itself = self
            Cycle.alive += 1

        def __del__(self) -> None:
            Cycle.alive -= 1

    callback = GarbageCollection(3)
    callback.before_training(SimpleNamespace())
    seen = []
    for iteration in range(1, 7):
        Cycle()
        for _ in range(2000):
            [].append([])
        callback.after_step(SimpleNamespace(), SimpleNamespace(iteration=iteration))
        seen.append(Cycle.alive)
    callback.close()
    assert seen == [1, 2, 0, 1, 2, 0]
    assert gc.isenabled()
