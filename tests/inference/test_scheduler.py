"""Blocks are held, shared, given back; sequences join as they fit, and none is lost."""

import random

import pytest

from megatron_qwen.inference.blocks import BLOCK, BlockPool, blocks_of
from megatron_qwen.inference.request import Request, Sampling
from megatron_qwen.inference.scheduler import Limits, Scheduler
from megatron_qwen.inference.sequence import Sequence


def sequence(length: int, new: int = 5, *, start: int = 0, number: int = 0) -> Sequence:
    prompt = tuple(range(start, start + length))
    return Sequence(Request(prompt, Sampling(max_new_tokens=new), number=number), longest=10_000)


def step(scheduler: Scheduler) -> tuple[list[tuple[int, int, int]], list[Sequence]]:
    """What a step computes, (number, start, stop), and what is finished after it; every token chosen is 7."""
    spans = scheduler.step()
    shown = [(span.sequence.request.number, span.start, span.stop) for span in spans]
    for span in spans:
        assert len(span.sequence.blocks) >= blocks_of(span.stop)
        if span.is_at_end:
            span.sequence.take(7, 0.0)
    return shown, list(scheduler.done(spans))


def test_a_long_prompt_is_computed_in_parts_beside_others():
    scheduler = Scheduler(BlockPool(20), Limits(sequences=4, tokens=100))
    scheduler.add(sequence(250, number=0))
    scheduler.add(sequence(10, number=1, start=1000))
    assert step(scheduler)[0] == [(0, 0, 100)]
    assert step(scheduler)[0] == [(0, 100, 200)]
    assert step(scheduler)[0] == [(0, 200, 250), (1, 0, 10)]
    assert step(scheduler)[0] == [(0, 250, 251), (1, 10, 11)]


@pytest.mark.parametrize("first", [False, True])
def test_many_tokens_of_prompts_have_a_step_of_their_own_where_it_is_asked_for(first):
    """Steps of few tokens of prompts have what is being answered beside them in any case."""
    scheduler = Scheduler(BlockPool(20), Limits(sequences=4, tokens=100, prompts_first=first))
    scheduler.add(sequence(20, number=0))
    assert step(scheduler)[0] == [(0, 0, 20)]
    scheduler.add(sequence(140, number=1, start=1000))
    answered = [] if first else [(0, 20, 21)]
    assert step(scheduler)[0] == [*answered, (1, 0, 100)]
    at = 20 if first else 21
    assert step(scheduler)[0] == [(0, at, at + 1), (1, 100, 140)]
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.pool.free == 20


def test_a_block_is_shared_when_the_step_that_fills_it_is_taken():
    """A sequence that is being answered fills a block in a step that is put off: nobody takes it over before."""
    scheduler = Scheduler(BlockPool(20), Limits(sequences=4, tokens=128))
    scheduler.add(sequence(63, number=0))
    assert step(scheduler)[0] == [(0, 0, 63)]
    filled = scheduler.running[0]
    scheduler.add(sequence(126, number=1, start=1000))
    assert step(scheduler)[0] == [(1, 0, 126)]
    assert scheduler.pool.share(filled.name_of(0)) is None
    assert step(scheduler)[0] == [(0, 63, 64), (1, 126, 127)]
    assert scheduler.pool.share(filled.name_of(0)) == filled.blocks[0]


def test_equal_beginnings_share_blocks():
    pool = BlockPool(20)
    scheduler = Scheduler(pool, Limits(tokens=1000))
    scheduler.add(sequence(200, number=0))
    assert step(scheduler)[0] == [(0, 0, 200)]
    scheduler.add(sequence(200, number=1))
    shown, _ = step(scheduler)
    assert shown == [(0, 200, 201), (1, 192, 200)]
    first, second = scheduler.running
    assert first.blocks[:3] == second.blocks[:3]
    assert first.blocks[3] != second.blocks[3]
    while scheduler.has_work:
        step(scheduler)
    assert pool.free == 20
    scheduler.add(sequence(200, number=2))  # nobody holds them any more, and they are still there
    assert step(scheduler)[0] == [(2, 192, 200)]


def test_equal_beginnings_share_blocks_in_one_step():
    scheduler = Scheduler(BlockPool(20), Limits(tokens=1000))
    for number in range(2):
        scheduler.add(sequence(200, number=number))
    assert step(scheduler)[0] == [(0, 0, 200), (1, 192, 200)]


def test_a_scored_text_shares_what_is_before_its_score():
    scheduler = Scheduler(BlockPool(20), Limits(tokens=1000))
    prompt = tuple(range(200))
    for number, first in enumerate((1, 130, 199)):
        scheduler.add(Sequence(Request(prompt, None, number, score_from=first), longest=10_000))
    shown, done = step(scheduler)
    assert shown == [(0, 0, 199), (1, 128, 199), (2, 192, 199)], "nothing is asked of the last token"
    assert len(done) == 3


def test_what_was_put_back_is_not_shared():
    """It has not been computed, although its blocks were meant to be."""
    scheduler = Scheduler(BlockPool(4), Limits(tokens=1000))
    scheduler.add(sequence(2 * BLOCK - 1, new=2 * BLOCK, number=0))
    scheduler.add(sequence(BLOCK + 1, new=BLOCK, start=5000, number=1))
    held = {}
    while scheduler.has_work:
        spans = scheduler.step()
        for span in spans:
            for number in range(span.start // BLOCK, span.stop // BLOCK):
                held[span.sequence.name_of(number)] = span.sequence.blocks[number]
            span.sequence.take(7, 0.0) if span.is_at_end else None
        assert all(held[name] == block for name, block in scheduler.pool._named.items())
        list(scheduler.done(spans))
    assert scheduler.preempted


def test_a_whole_prompt_that_is_there_computes_its_last_token():
    scheduler = Scheduler(BlockPool(20), Limits(tokens=1000))
    for number in range(2):
        scheduler.add(sequence(2 * BLOCK, new=1, number=number))
        shown, done = step(scheduler)
        assert len(done) == 1
        assert shown == [(number, BLOCK * number, 2 * BLOCK)]


def test_none_is_lost_where_blocks_run_out():
    dice = random.Random(4)
    pool = BlockPool(9)
    scheduler = Scheduler(pool, Limits(sequences=8, tokens=128))
    wanted = [(dice.randrange(1, 300), dice.randrange(1, 200)) for _ in range(40)]
    for number, (length, new) in enumerate(wanted):
        scheduler.add(sequence(length, new, start=1000 * number, number=number))
    finished = []
    for _ in range(20_000):
        if not scheduler.has_work:
            break
        shown, done = step(scheduler)
        assert shown, "a step computes something"
        assert len({number for number, *_ in shown}) == len(shown)
        finished += done
    assert sorted(one.request.number for one in finished) == list(range(40))
    assert [len(one.answer.tokens) for one in sorted(finished, key=lambda one: one.request.number)] == [
        new for _, new in wanted
    ]
    assert scheduler.preempted > 0
    assert pool.free == 9
