"""Which set of pieces a run resumes from, and where each piece comes from."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_qwen.checkpoint.local.nodes import Nodes, make_private, place_of_run
from megatron_qwen.checkpoint.local.piece import PieceName, PieceWriter, StagedPiece
from megatron_qwen.checkpoint.paths import committed

LAYOUT, OTHER = "0" * 16, "1" * 16


def put(
    root: Path, node: str, rank: int, iteration: int, *, attempt: int = 1, layout: str = LAYOUT, held: bool = False
) -> Path:
    """A piece of a rank on a node, whose tensor tells both numbers."""
    import torch

    directory = place_of_run(root / node, "run")
    make_private(directory)
    staged = StagedPiece()
    # The same in every attempt: training is deterministic.
    staged.fill(lambda: iter([("state", torch.tensor([iteration, rank]))]), {"iteration": iteration})
    writer = PieceWriter(directory)
    for chunk in staged.chunks():
        writer.write(chunk)
    name = PieceName(iteration, attempt, rank, 2, layout, writer.digest())
    writer.finish(name.as_held() if held else name)
    return directory / str(name.as_held() if held else name)


def whole(root: Path, iteration: int, **named: Any) -> dict[tuple[str, int], Path]:
    """All four pieces of two ranks on a and b, by node and rank."""
    places = [("a", 0, False), ("b", 1, False), ("a", 1, True), ("b", 0, True)]
    return {(node, rank): put(root, node, rank, iteration, held=held, **named) for node, rank, held in places}


def flip(path: Path) -> None:
    """Flips one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def found(root: Path, nodes: Sequence[str], newer_than: int, refused: int) -> dict[str, Any]:
    """What a rank would resume from, and what was logged."""
    import logging

    import torch.distributed as dist

    from megatron_qwen.checkpoint.local.restore import find_newest

    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_qwen").addHandler(handler)
    rank = dist.get_rank()
    try:
        state = find_newest(
            place_of_run(root / nodes[rank], "run"),
            Nodes(tuple(nodes)),
            layout=LAYOUT,
            newer_than=newer_than if rank == 0 else 99,  # a rank's look at a shared file system may be old
            refuse=lambda _, facts: "no" if facts["iteration"] == refused and rank == 1 else None,
        )
    finally:
        logging.getLogger("megatron_qwen").removeHandler(handler)
    if state is None:
        return {"iteration": None, "log": heard}
    assert state.tensors["state"].tolist() == [state.iteration, rank]
    return {"iteration": state.iteration, "copies": state.copies, "log": heard}


@pytest.fixture
def look(pool, tmp_path):
    """Iteration, pieces that came from other nodes, and the log of rank 0; ranks agree."""

    def ask(*nodes: str, newer_than: int = 0, refused: int = -1) -> tuple[int | None, int, str]:
        first, second = pool[2].run(found, tmp_path, nodes, newer_than, refused)
        assert first["iteration"] == second["iteration"]
        return first["iteration"], first.get("copies", 0), "\n".join(first["log"])

    return ask


def test_the_newest_set_is_taken_from_wherever_it_is(look, tmp_path):
    assert look("a", "b") == (None, 0, "")
    whole(tmp_path, 4)
    whole(tmp_path, 6)
    assert look("a", "b") == (6, 0, "")
    assert look("a", "b", newer_than=5) == (6, 0, "")
    assert look("a", "b", newer_than=6) == (None, 0, "")
    # Both ranks on one node that holds both, a node that is new, and ranks that have changed places.
    assert look("a", "a")[:2] == (6, 0)
    assert look("c", "b")[:2] == (6, 1)
    for path in tmp_path.rglob("*.held.*"):
        path.unlink()
    assert look("b", "a")[:2] == (6, 2)
    assert look("c", "b")[0] is None
    assert look("c", "d")[0] is None


def test_an_incomplete_set_is_passed_over(look, tmp_path):
    whole(tmp_path, 4)
    put(tmp_path, "a", 0, 6)
    iteration, _, log = look("a", "b")
    assert iteration == 4
    assert log == (
        "local checkpoint 6 of attempt 1 cannot be used: on no node of the run is there a good piece of rank 1"
    )


def test_a_damaged_piece_is_replaced_by_its_copy(look, tmp_path):
    whole(tmp_path, 4)
    pieces = whole(tmp_path, 6)
    flip(pieces["a", 0])
    iteration, copies, log = look("a", "b")
    assert (iteration, copies) == (6, 1)
    assert f"a piece of rank 0 is refused: {pieces['a', 0]} has other bytes than when it was written on a" in log
    flip(pieces["b", 0])
    iteration, copies, log = look("a", "b")
    assert (iteration, copies) == (4, 0)
    assert "checkpoint 6 of attempt 1 cannot be used: on no node of the run is there a good piece of rank 0; " in log


def test_pieces_of_two_attempts_make_no_set(look, tmp_path):
    """A rank of a superseded attempt may have gone on: its piece does not complete another attempt's."""
    whole(tmp_path, 4)
    put(tmp_path, "a", 0, 6, attempt=1)
    put(tmp_path, "b", 1, 6, attempt=2)
    assert look("a", "b")[0] == 4
    put(tmp_path, "a", 0, 6, attempt=2)
    assert look("a", "b")[0] == 6


def test_what_cannot_be_used_is_said(look, tmp_path):
    whole(tmp_path, 4)
    whole(tmp_path, 8, layout=OTHER)
    whole(tmp_path, 6)
    iteration, _, log = look("a", "b", refused=6)
    assert iteration == 4
    assert "local checkpoint 8 of attempt 1 cannot be used: it was written under another layout" in log
    assert "local checkpoint 6 of attempt 1 cannot be used: rank 1: no" in log


def resumed_at(run) -> list[int]:
    """Where each attempt began, by the rows of metrics that count."""
    said = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in said] == list(range(1, 9))
    return [next(row["iteration"] - 1 for row in said if row["attempt"] == number) for number in (1, 2)]


def test_a_fault_loses_at_most_the_interval(local_run, undisturbed):
    run = local_run()
    assert [answer["code"] for answer in run.attempt("a", "b", fail_after=5)] == [None, None]
    assert committed(run.run_dir / "checkpoints") == []
    assert {(name.rank, name.kept) for name in run.pieces("b")} == {(1, "own"), (0, "held")}
    answers = run.attempt("a", "b")
    assert "resumed from a local checkpoint at iteration 4" in answers[0]["log"]
    assert resumed_at(run) == [0, 4]
    assert run.hashes() == undisturbed
    assert run.pieces("a") == run.pieces("b") == [], "a run that is done leaves nothing on its nodes"


def test_a_lost_node_is_replaced_by_its_partner_and_a_bit_by_its_copy(local_run, undisturbed):
    run = local_run()
    run.attempt("a", "b", fail_after=5)
    shutil.rmtree(run.root / "nodes" / "a")
    answers = run.attempt("c", "b", fail_after=7)
    assert "resumed from a local checkpoint at iteration 4, 1 of 2 pieces from other nodes" in answers[0]["log"]
    (newest,) = run.place("c").glob("iter_0000006*.own.*")
    flip(newest)
    answers = run.attempt("c", "b")
    assert "resumed from a local checkpoint at iteration 6, 1 of 2 pieces from other nodes" in answers[0]["log"]
    assert run.hashes() == undisturbed


def test_both_nodes_lost(local_run, undisturbed):
    run = local_run("checkpoint.save_interval=3")
    run.attempt("a", "b", fail_after=5)
    answers = run.attempt("c", "d")
    assert "local checkpoint at" not in "\n".join(answers[0]["log"])
    assert resumed_at(run) == [0, 3]
    assert run.hashes() == undisturbed
    card = json.loads((run.run_dir / "performance.json").read_text())
    assert card["saving"]["iterations"] == 3
    assert 0 < card["saving"]["best_lost"] <= card["saving"]["lost"] <= 1


def test_whoever_goes_back_before_a_checkpoint_is_not_overruled(local_run, undisturbed):
    """A person removes the newest checkpoint: local ones that continue it are not used either."""
    run = local_run("checkpoint.save_interval=3")
    run.attempt("a", "b", fail_after=7)
    assert {name.iteration for name in run.pieces("a")} == {4, 6}
    shutil.rmtree(run.run_dir / "checkpoints" / "iter_0000006")
    run.config = run.config.with_section("checkpoint", save_interval=0)
    log = "\n".join(run.attempt("a", "b")[0]["log"])
    assert "local checkpoint 6 of attempt 1 cannot be used: rank 0: it continues the checkpoint of iteration 6" in log
    assert resumed_at(run) == [0, 4]
    assert run.hashes() == undisturbed


def test_a_new_run_in_the_same_place_begins_anew(local_run):
    run = local_run()
    run.attempt("a", "b", fail_after=5)
    (run.run_dir / "attempts.jsonl").unlink()
    log = "\n".join(run.attempt("a", "b", fail_after=1)[0]["log"])
    assert "resumed" not in log
    assert "holds local checkpoints of 1 other runs" in log
