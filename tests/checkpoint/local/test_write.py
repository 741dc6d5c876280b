"""Whatever fails about a local checkpoint, the run goes on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_qwen.config.run import RunConfig
from tests.checkpoint.local import runs


def text(answers: list[dict[str, Any]]) -> str:
    return "\n".join(line for answer in answers for line in answer["log"])


def test_a_node_that_cannot_be_written_to(local_run, undisturbed):
    """A set that lacks a piece replaces none; on the other node nothing of it is left."""
    run = local_run()
    (run.root / "nodes").mkdir()
    (run.root / "nodes" / "b").write_text("a file where the directory should be")
    answers = run.attempt("a", "b", fail_after=7)
    assert "rank 1: local checkpoint 2: [Errno 20] Not a directory" in text(answers)
    assert "rank 1: local checkpoint 4: " in text(answers)
    assert {name.iteration for name in run.pieces("a")} == {6}, "the newest, of which nobody has been asked yet"
    (run.root / "nodes" / "b").unlink()
    answers = run.attempt("a", "b")
    assert [answer["code"] for answer in answers] == [0, 0]
    # Both pieces are on a: the partner sent what it could not write.
    assert "resumed from a local checkpoint at iteration 6, 1 of 2 pieces from other nodes" in text(answers)
    assert run.hashes() == undisturbed


def unanswered(config: RunConfig, run_dir: Path, nodes: Sequence[str], fail_after: int | None) -> dict[str, Any]:
    """An attempt in which partners cannot reach one another."""
    from megatron_qwen.checkpoint.local.exchange import PartnerExchange

    def fails(*_: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    plain = PartnerExchange.swap
    PartnerExchange.swap = fails  # type: ignore[method-assign]
    try:
        return runs.attempt(config, run_dir, nodes, fail_after)
    finally:
        PartnerExchange.swap = plain  # type: ignore[method-assign]


def test_partners_that_do_not_answer(local_run, undisturbed):
    run = local_run()
    answers = run.pool[2].run(unanswered, run.config, run.run_dir, ("a", "b"), 5)
    assert "local checkpoint 2: the partner did not answer: Connection closed by peer" in text(answers)
    assert "local checkpoints are not all copied to other nodes" in text(answers)
    assert "local checkpoint 4: the partner" not in text(answers), "nobody tries again"
    assert {(name.rank, name.kept) for name in (*run.pieces("a"), *run.pieces("b"))} == {(0, "own"), (1, "own")}
    assert "resumed from a local checkpoint at iteration 4" in text(run.attempt("a", "b"))
    assert run.hashes() == undisturbed


def test_the_two_newest_are_kept(local_run):
    run = local_run()
    run.attempt("a", "b", fail_after=7)
    for node in "ab":
        assert sorted((name.iteration, name.kept) for name in run.pieces(node)) == [
            (4, "held"), (4, "own"), (6, "held"), (6, "own"),
        ]  # fmt: skip
    assert (run.place("a").stat().st_mode & 0o777) == 0o700
