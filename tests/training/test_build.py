"""Runs that cannot be built here."""

from tests.conftest import run


def test_all_that_this_machine_cannot_do_is_said_at_once(tokens, tmp_path):
    forced = ["performance.cuda_graph_impl=local", "performance.moe_token_dispatcher=deepep"]
    done = run("launch.train", "tiny_moe", f"data.path={tokens}", *forced, "--run-dir", tmp_path / "run", gpu=False)
    assert done.returncode == 2
    assert "performance.cuda_graph_impl = local" in done.stderr
    assert "performance.moe_token_dispatcher = deepep" in done.stderr
    assert "Traceback" not in done.stderr
