"""Whom a collective waits for, from traces as ``distributed.flight_recorder`` writes them."""

import json

from megatron_qwen.job.collectives import read, summarise
from megatron_qwen.resilience.dump_watch import trace_file


def group(name, ranks, number, *, done=False, operation="nccl:all_reduce", description="", p2p=False):
    one = {"collective_seq_id": number, "profiling_name": operation, "is_p2p": p2p, "done": done, "input_sizes": [[3]]}
    before = {**one, "collective_seq_id": number - 1, "done": True}
    return {"name": name, "description": description, "ranks": ranks, "collectives": [before, one]}


ALL = [0, 1, 2, 3]


def test_a_rank_that_has_not_come():
    traces = {rank: [group("0", ALL, 7 if rank != 2 else 6, done=rank == 2)] for rank in ALL}
    found = summarise(traces)
    assert found.lines == (
        "group 0 of 4 ranks: ranks 0, 1, 3 wait in nccl:all_reduce, number 7; rank 2 came no further than 6",
    )
    assert found.behind == (2,)


def test_a_rank_that_has_called_nothing_of_the_group():
    found = summarise({0: [group("5", [0, 1], 1, description="TP")], 1: []})
    assert found.lines == (
        "group 5 (TP) of 2 ranks: rank 0 waits in nccl:all_reduce, number 1; rank 1 came no further than 0",
    )
    assert found.behind == (1,)


def test_a_rank_that_waits_elsewhere_is_not_to_blame():
    """Rank 1 says nothing. Rank 0 waits for it in a group of two, and rank 2 waits for rank 0 in another."""
    found = summarise({0: [group("a", [0, 1], 4), group("b", [0, 2], 8, done=True)], 2: [group("b", [0, 2], 9)]})
    assert found.behind == ()
    assert found.lines[0].endswith("; nothing is known of rank 1")
    assert "rank 0 came no further than 8" in found.lines[1]


def test_ranks_that_part():
    traces = {
        rank: [group("0", ALL, 7, operation="nccl:broadcast" if rank == 3 else "nccl:all_reduce")] for rank in ALL
    }
    found = summarise(traces)
    assert (
        "different collectives as number 7: nccl:all_reduce on ranks 0, 1, 2; nccl:broadcast on rank 3"
        in found.lines[0]
    )
    assert found.behind == ()  # it waits, as the others do


def test_all_have_called_it():
    found = summarise({rank: [group("0", ALL, 7)] for rank in ALL})
    assert found.lines == (
        "group 0 of 4 ranks: ranks 0, 1, 2, 3 wait in nccl:all_reduce, number 7, "
        "which every rank that answered has called",
    )
    assert found.behind == ()


def test_nobody_waits():
    assert summarise({rank: [group("0", ALL, 7, done=True)] for rank in ALL}) == summarise({})
    assert summarise({0: [group("0", [0, 1], 3, p2p=True)]}).lines == ()


def test_files_that_cannot_be_read_are_left_out(tmp_path):
    trace_file(tmp_path, 0).write_text(json.dumps({"groups": [group("0", [0], 1), 5]}))
    trace_file(tmp_path, 1).write_text('{"groups": [')
    trace_file(tmp_path, 2).write_text("[]")
    found = read(tmp_path, [0, 1, 2, 3])
    assert list(found) == [0]
    assert len(found[0]) == 1
