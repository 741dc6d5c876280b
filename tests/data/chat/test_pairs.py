"""Pairs of answers in the forms in which they are published, and what is wrong with others."""

import pytest

from megatron_qwen.data.chat.conversation import Rejected
from megatron_qwen.data.chat.pairs import pair_of

ASK = {"role": "user", "content": "2 + 2?"}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
FORMS = {
    "texts": {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    "messages": {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    "a message each": {"prompt": [ASK], "chosen": GOOD, "rejected": BAD},
    "whole conversations": {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "2 + 2?"}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    },
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    chosen, rejected = pair_of(FORMS[name])
    assert chosen.messages == [ASK, GOOD]
    assert rejected.messages == [ASK, BAD]
    assert not chosen.untrained
    assert not rejected.untrained


def test_answers_of_the_prompt_carry_no_loss():
    turns = [ASK, {"role": "assistant", "content": "4?"}, {"role": "user", "content": "sure?"}]
    for record in (
        {"prompt": turns, "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [*turns, GOOD], "rejected": [*turns, BAD]},
    ):
        for one in pair_of(record):
            assert one.untrained == {1}
            assert len(one.messages) == 4


def test_answers_may_have_several_turns():
    more = [GOOD, {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]
    chosen, rejected = pair_of({"prompt": [ASK], "chosen": more, "rejected": [BAD]})
    assert len(chosen.messages) == 4
    assert not chosen.untrained
    assert len(rejected.messages) == 2


def test_a_system_text_is_in_front_of_both():
    for one in pair_of({"system": "be brief", "prompt": "2 + 2?", "chosen": "4", "rejected": "5"}):
        assert one.messages[0] == {"role": "system", "content": "be brief"}


WRONG = {
    "a list": ([], "no object"),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "no pair"),
    "the same": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "no difference"),
    "the same conversations": ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}, "no difference"),
    "one ends earlier": ({"chosen": [ASK, GOOD], "rejected": [ASK]}, "no answer"),
    "another question": (
        {"chosen": [ASK, GOOD], "rejected": [{"role": "user", "content": "3 + 3?"}, BAD]},
        "no answer",
    ),
    "an answer of the user": ({"prompt": [ASK], "chosen": [GOOD], "rejected": [ASK]}, "no answer"),
    "an empty answer": ({"prompt": [ASK], "chosen": [GOOD], "rejected": [{**BAD, "content": " "}]}, "empty turn"),
    "two prompts": ({**FORMS["ShareGPT"], "prompt": "x"}, "several forms"),
    "a prompt of numbers": ({"prompt": 3, "chosen": "b", "rejected": "c"}, "messages are no list"),
    "an answer of numbers": ({"prompt": "a", "chosen": 3, "rejected": "c"}, "messages are no list"),
    "an empty list": ({"prompt": "a", "chosen": [], "rejected": "c"}, "no answer"),
    "no question": ({"prompt": [], "chosen": "b", "rejected": "c"}, None),
    "another role": ({"prompt": [{"role": "pope", "content": "x"}], "chosen": "b", "rejected": "c"}, "unknown role"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong(name):
    record, reason = WRONG[name]
    found = pair_of(record)
    if reason is None:  # a text that goes on from nothing is a conversation, as transformers takes it
        assert not isinstance(found, Rejected)
        return
    assert isinstance(found, Rejected)
    assert found.reason == reason
    assert found.fix
