"""The engine against the training forward, to the last bit, under every kind of layout; sequences join and leave."""

import random
from dataclasses import replace
from typing import Any

import pytest

from megatron_qwen.inference.request import Answer, Request, Sampling
from megatron_qwen.inference.scheduler import Limits
from megatron_qwen.recipes.registry import RECIPES
from tests.distributed import jobs as training_jobs
from tests.distributed.layouts import DENSE, MOE
from tests.inference import jobs
from tests.tiers import cases, count

LENGTHS = (1, 2, 5, 60, 63, 64, 65, 129, 200)
TP2, TP2SP, PP2, EP2, DP2 = "TP2", "TP2+SP", "PP2", "EP2", "DP2"


def requests(recipe: str, number: int, *, seed: int = 0) -> list[Request]:
    """Prompts of all lengths; half of the answers are sampled."""
    dice, vocabulary = random.Random(seed), RECIPES[recipe]().model.vocab_size
    found = []
    for index in range(number):
        prompt = tuple(dice.randrange(vocabulary) for _ in range(LENGTHS[index % len(LENGTHS)]))
        sampling = Sampling(max_new_tokens=dice.choice([3, 17, 70]), temperature=float(index % 2), top_p=0.95, seed=7)
        found.append(Request(prompt, sampling, number=index))
    return found


def texts(asked: list[Request], answers: list[Answer]) -> list[list[int]]:
    return [[*request.prompt, *answer.tokens] for request, answer in zip(asked, answers, strict=True)]


def config_of(recipe: str, layout: dict[str, Any]) -> Any:
    return training_jobs.with_layout(RECIPES[recipe](), layout)


@pytest.fixture(scope="module")
def alone(pool):
    """Requests, answers and their texts of one rank, by recipe."""
    kept: dict[str, tuple[list[Request], list[Answer], list[list[int]]]] = {}

    def of(recipe: str) -> tuple[list[Request], list[Answer], list[list[int]]]:
        if recipe not in kept:
            asked = requests(recipe, count(quick=18, thorough=64))
            found = pool[1].run(jobs.answers, RECIPES[recipe](), asked)[0]["answers"]
            kept[recipe] = asked, found, texts(asked, found)
        return kept[recipe]

    return of


@pytest.mark.parametrize("recipe", ["tiny_dense", "tiny_moe", "tiny_qwen3", "tiny_qwen3_moe"])
def test_bits_of_the_training_forward(recipe, pool, alone):
    asked, answers, whole = alone(recipe)
    trained = pool[1].run(jobs.whole_texts, RECIPES[recipe](), whole)[0]
    for request, answer, expected in zip(asked, answers, trained, strict=True):
        assert answer.logprobs == expected[len(request.prompt) - 1 :]
    scored = [Request(tuple(text), None, number=index) for index, text in enumerate(whole)]
    again = pool[1].run(jobs.answers, RECIPES[recipe](), scored)[0]["answers"]
    assert [answer.prompt_logprobs for answer in again] == trained


def test_bits_of_a_wide_model(pool):
    """With inner dimensions at which MKL's products depend on the number of rows, and wide heads."""
    config = RECIPES["tiny_qwen3"]()
    wide = {"hidden_size": 640, "ffn_hidden_size": 1024, "num_attention_heads": 4, "num_query_groups": 2}
    config = replace(config, model=replace(config.model, kv_channels=192, **wide))
    asked = requests("tiny_qwen3", 9)
    answers = pool[1].run(jobs.answers, config, asked)[0]["answers"]
    trained = pool[1].run(jobs.whole_texts, config, texts(asked, answers))[0]
    for request, answer, expected in zip(asked, answers, trained, strict=True):
        assert answer.logprobs == expected[len(request.prompt) - 1 :]


@pytest.mark.parametrize(
    ("recipe", "layout"),
    cases(
        [("tiny_dense", TP2SP), ("tiny_dense", PP2), ("tiny_moe", EP2)],
        [("tiny_dense", TP2), ("tiny_dense", DP2), ("tiny_moe", TP2SP), ("tiny_moe", PP2), ("tiny_qwen3_moe", EP2)],
    ),
)
def test_layouts(recipe, layout, pool, alone):
    asked, answers, whole = alone(recipe)
    ranks, changes = (MOE if "moe" in recipe else DENSE)[layout]
    config = config_of(recipe, changes)
    for rank in pool[ranks].run(jobs.answers, config, asked):
        for one, other in zip(answers, rank["answers"], strict=True):
            assert one.tokens == other.tokens
            assert one.reason == other.reason
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        # A stage computes what one rank does; other layouts have sums of their own, in training as here.
        same, on = (config, ranks) if layout != PP2 else (RECIPES[recipe](), 1)
        trained = pool[on].run(jobs.whole_texts, same, whole)[0]
        for request, answer, expected in zip(asked, rank["answers"], trained, strict=True):
            assert answer.logprobs == expected[len(request.prompt) - 1 :]


@pytest.mark.parametrize("limits", [Limits(sequences=1), Limits(sequences=7, tokens=64), Limits(sequences=64)])
def test_texts_do_not_depend_on_the_batch(limits, pool, alone):
    asked, answers, _ = alone("tiny_dense")
    found = pool[1].run(jobs.answers, RECIPES["tiny_dense"](), asked, 512, 64, limits)[0]["answers"]
    assert [answer.tokens for answer in found] == [answer.tokens for answer in answers]
    assert [answer.logprobs for answer in found] == [answer.logprobs for answer in answers]


def test_where_blocks_run_out(pool, alone):
    """Sequences are put back and computed again, to the same texts."""
    asked, answers, _ = alone("tiny_dense")
    found = pool[1].run(jobs.answers, RECIPES["tiny_dense"](), asked, 512, 7)[0]
    assert found["preempted"] > 0
    assert [answer.tokens for answer in found["answers"]] == [answer.tokens for answer in answers]
    assert [answer.logprobs for answer in found["answers"]] == [answer.logprobs for answer in answers]


def test_up_to_the_end_of_the_context(pool):
    """In a cache of just as many blocks; two requests of one prompt are two."""
    config = RECIPES["tiny_dense"]()
    prompt = tuple(range(100))
    asked = [Request(prompt, Sampling(max_new_tokens=1000), number=0), Request(prompt, Sampling(), number=0)]
    for one in asked:
        (answer,) = pool[1].run(jobs.answers, config, [one], 128, 2)[0]["answers"]
        assert (len(answer.tokens), answer.reason) == (28, "length")
    (scored,) = pool[1].run(jobs.answers, config, [Request(prompt + prompt[:28], None)], 128, 2)[0]["answers"]
    assert len(scored.prompt_logprobs) == 127
    assert pool[1].run(jobs.counted, config, asked)[0] == 2


def test_scores_of_endings(pool, alone):
    """Of texts with one beginning, which is computed once, also by one that joins in the same step."""
    recipe = "tiny_dense"
    _, _, whole = alone(recipe)
    text = max(whole, key=len)
    ends = [70, 128, 129, len(text) - 1]
    asked = [Request(tuple(text[: end + 1]), None, number=at, score_from=end) for at, end in enumerate(ends)]
    (trained,) = pool[1].run(jobs.whole_texts, RECIPES[recipe](), [text])[0]
    for limits in (Limits(), Limits(sequences=1), Limits(tokens=64)):
        found = pool[1].run(jobs.answers, RECIPES[recipe](), asked, 512, 64, limits)[0]["answers"]
        assert [answer.prompt_logprobs for answer in found] == [[trained[end - 1]] for end in ends]


@pytest.mark.parametrize(
    ("recipe", "layout"), cases([("tiny_dense", TP2SP), ("tiny_moe", EP2)], [("tiny_dense", DP2), ("tiny_dense", PP2)])
)
def test_rank_0_asks_and_all_answer(recipe, layout, pool, alone):
    """Several times; replicas divide the requests, and one of them may have none."""
    asked, answers, _ = alone(recipe)
    ranks, changes = (MOE if "moe" in recipe else DENSE)[layout]
    rank_0, *others = pool[ranks].run(jobs.asked_of_rank_0, config_of(recipe, changes), [asked[:1], [], asked])
    assert others == [None] * (ranks - 1)
    assert [one.tokens for one in (rank_0[0][0], *(rank_0[2][at] for at in range(len(asked))))] == [
        one.tokens for one in (answers[0], *answers)
    ]
    assert rank_0[1] == {}


@pytest.mark.parametrize("longest", [2, 5, 70, 512])
def test_the_probe(longest, pool):
    """It finds nothing here, and a rounding error where one is made."""
    assert pool[1].run(jobs.probed, RECIPES["tiny_dense"](), longest, False)[0] == 0.0
    assert longest < 70 or pool[1].run(jobs.probed, RECIPES["tiny_dense"](), longest, True)[0] > 0


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (Request((), Sampling()), "has no tokens"),
        (Request(tuple(range(128)), Sampling()), "the model has 128 positions"),
        (Request((1,), Sampling(max_new_tokens=100)), "the cache holds 64"),
        (Request((1, 5000), Sampling(max_new_tokens=2)), "is none of the"),
        (Request((1, -1), None), "is none of the"),
        (Request((1, 2), None, score_from=2), "1 to 1"),
        (Request((1, 2), None, score_from=0), "1 to 1"),
    ],
)
def test_what_cannot_be_answered(request_, told, pool):
    assert told in pool[1].run(jobs.problem, RECIPES["tiny_dense"](), request_, 128, 1)[0]
