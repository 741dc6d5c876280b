"""What a run says when it starts."""

from megatron_qwen.estimate import choices
from tests.conftest import run


def test_every_choice_is_logged_with_its_reason(tokens, tmp_path):
    words = [f"data.path={tokens}", "training.train_iters=1", "optim.lr_warmup_iters=0"]
    done = run("launch.train", "tiny_moe", *words, "--nproc", 2, "--run-dir", tmp_path / "run", check=True)
    lines = [line.split("performance: ", 1)[1] for line in done.stderr.splitlines() if "performance: " in line]
    assert "parallel.overlap_grad_reduce=false: no overlap of communication with compute on a CPU" in lines
    assert any(line.startswith("performance.garbage_collection_interval=100: ") for line in lines)
    assert any("cross-entropy" in line for line in lines)
    chosen = [line.partition("=")[0] for line in lines if not line.startswith("output layer")]
    assert chosen == list(choices._RULES)
    asked = (tmp_path / "run" / "checkpoints" / "iter_0000001" / "run.yaml").read_text()
    assert "overlap_grad_reduce: null" in asked  # another machine may choose otherwise
