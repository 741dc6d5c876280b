"""Forms of conversations are recognised; what is wrong with one is said with its place and counted by its reason."""

import orjson
import pytest

from megatron_qwen.data.chat.conversation import Conversation, Rejected
from megatron_qwen.data.chat.forms import conversation_of

ASKED, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "r"}


def messages(*several, **more):
    return {"messages": list(several), **more}


def calls(*several):
    return {"role": "assistant", "content": "", "tool_calls": list(several)}


def nested(depth):
    return [nested(depth - 1)] if depth else 1


# Record, reason, and a part of the message that names the place.
WRONG = {
    "a list": ([1], "no object", "not a JSON object"),
    "a text": ("hello", "no object", "not a JSON object"),
    "null": (None, "no object", "not a JSON object"),
    "no form": ({"text": "hello"}, "no known form", "'text'"),
    "no field": ({}, "no known form", "none"),
    "two forms": ({"messages": [ASKED, SAID], "conversations": []}, "several forms", "messages and conversations"),
    "messages a text": ({"messages": "hello"}, "messages are no list", "messages"),
    "messages an object": ({"messages": {"role": "user"}}, "messages are no list", "messages"),
    "no messages": (messages(), "no messages", "no messages"),
    "a message a text": (messages("hi", SAID), "message is no object", "messages[0]"),
    "a message null": (messages(ASKED, None), "message is no object", "messages[1]"),
    "a message a list": (messages(ASKED, [SAID]), "message is no object", "messages[1]"),
    "no role": (messages({"content": "q"}, SAID), "no role", "messages[0]"),
    "role null": (messages({"role": None, "content": "q"}, SAID), "unknown role", "messages[0].role"),
    "role of another form": (messages({"role": "human", "content": "q"}, SAID), "unknown role", "'human'"),
    "role in capitals": (messages({"role": "User", "content": "q"}, SAID), "unknown role", "'User'"),
    "role a number": (messages({"role": 3, "content": "q"}, SAID), "unknown role", "3"),
    "role an object": (messages({"role": {"a": 1}, "content": "q"}, SAID), "unknown role", "messages[0].role"),
    "no content": (messages({"role": "user"}, SAID), "no content", "messages[0]"),
    "content null": (messages(ASKED, {"role": "assistant", "content": None}), "no content", "messages[1]"),
    "content a number": (messages({"role": "user", "content": 5}, SAID), "content is no text", "int"),
    "content an object": (messages({"role": "user", "content": {"a": 1}}, SAID), "content is no text", "dict"),
    "content of a picture": (
        messages({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, SAID),
        "content is no text",
        "messages[0].content[0]",
    ),
    "content part without text": (
        messages({"role": "user", "content": [{"type": "text"}]}, SAID),
        "content is no text",
        "content[0]",
    ),
    "content part a number": (messages({"role": "user", "content": [1]}, SAID), "content is no text", "content[0]"),
    "empty question": (messages({"role": "user", "content": ""}, SAID), "empty turn", "messages[0]"),
    "blank question": (messages({"role": "user", "content": " \n"}, SAID), "empty turn", "user says nothing"),
    "empty answer": (messages(ASKED, {"role": "assistant", "content": ""}), "empty turn", "messages[1]"),
    "blank answer": (messages(ASKED, {"role": "assistant", "content": "\t"}), "empty turn", "assistant says nothing"),
    "empty parts": (messages({"role": "user", "content": []}, SAID), "empty turn", "messages[0]"),
    "nobody answers": (messages(ASKED), "nothing to train", "no message of the assistant"),
    "system alone": (messages({"role": "system", "content": "s"}), "nothing to train", "no message"),
    "all answers without loss": (messages(ASKED, {**SAID, "weight": 0}), "nothing to train", "with a loss"),
    "weight below a hundredth": (messages(ASKED, {**SAID, "weight": 0.001}), "weight", "messages[1].weight"),
    "negative weight": (messages(ASKED, {**SAID, "weight": -0.5}), "weight", "-0.5"),
    "weight a text": (messages(ASKED, {**SAID, "weight": "1"}), "weight", "'1'"),
    "weight of two": (messages(ASKED, {**SAID, "weight": 2}), "weight", "2"),
    "result without a call": (messages(ASKED, RESULT, SAID), "tool result without a call", "messages[1]"),
    "result at the beginning": (messages(RESULT, SAID), "tool result without a call", "messages[0]"),
    "result after an answer": (
        messages(ASKED, CALL, RESULT, SAID, RESULT),
        "tool result without a call",
        "messages[4]",
    ),
    "a result too many": (
        messages(ASKED, CALL, {"role": "tool", "content": "r"}, {"role": "tool", "content": "r"}, SAID),
        "tool result without a call",
        "one result more",
    ),
    "result of another call": (
        messages(ASKED, CALL, {**RESULT, "tool_call_id": "2"}, SAID),
        "tool result without a call",
        "'2'",
    ),
    "result twice": (messages(ASKED, CALL, RESULT, RESULT, SAID), "tool result without a call", "messages[3]"),
    "calls a text": (messages(ASKED, {**SAID, "tool_calls": "f()"}), "tool calls", "must be a list"),
    "calls of a user": (messages({**ASKED, "tool_calls": CALL["tool_calls"]}, SAID), "tool calls", "role user"),
    "a call a text": (messages(ASKED, calls("f()")), "tool calls", "tool_calls[0]"),
    "a call without a name": (messages(ASKED, calls({"arguments": {}})), "tool calls", "no name"),
    "a call with an empty name": (messages(ASKED, calls({"name": "", "arguments": {}})), "tool calls", "no name"),
    "a function a text": (messages(ASKED, calls({"function": "f"})), "tool calls", "tool_calls[0]"),
    "arguments no JSON": (
        messages(ASKED, calls({"name": "f", "arguments": "{x: 1}"})),
        "arguments are no JSON",
        "tool_calls[0]",
    ),
    "arguments cut off": (
        messages(ASKED, calls({"name": "f", "arguments": '{"x": "a'})),
        "arguments are no JSON",
        "tool_calls[0]",
    ),
    "arguments a list": (
        messages(ASKED, calls({"name": "f", "arguments": "[1]"})),
        "arguments are no object",
        "JSON object",
    ),
    "arguments a number": (
        messages(ASKED, calls({"name": "f", "arguments": 1})),
        "arguments are no object",
        "JSON object",
    ),
    "the second call": (
        messages(ASKED, calls({"name": "f", "arguments": {}}, {"name": "g", "arguments": "}"})),
        "arguments are no JSON",
        "tool_calls[1]",
    ),
    "tools an object": (messages(ASKED, SAID, tools={"name": "f"}), "tools", "must be a list"),
    "tools no JSON": (messages(ASKED, SAID, tools="[{"), "tools", "not JSON"),
    "a tool without a name": (messages(ASKED, SAID, tools=[{"description": "d"}]), "tools", "tools[0]"),
    "a tool a text": (messages(ASKED, SAID, tools=["f"]), "tools", "tools[0]"),
    "reasoning of a user": (messages({**ASKED, "reasoning": "hm"}, SAID), "reasoning", "messages[0]"),
    "reasoning a list": (messages(ASKED, {**SAID, "reasoning_content": ["hm"]}), "reasoning", "messages[1]"),
    "a character of programs": (messages(ASKED, {"role": "assistant", "content": "a\ufdd0"}), "no character", "U+FDD0"),
    "such a one in a tool": (messages(ASKED, SAID, tools=[{"name": "f\ufdd3"}]), "no character", "tools"),
    "turns a text": ({"conversations": "hello"}, "messages are no list", "conversations"),
    "no turns": ({"conversations": []}, "no messages", "no messages"),
    "from an unknown": (
        {"conversations": [{"from": "alien", "value": "q"}]},
        "unknown role",
        "conversations[0].from is 'alien'",
    ),
    "from a number": ({"conversations": [{"from": 1, "value": "q"}]}, "unknown role", "conversations[0].from"),
    "no value": ({"conversations": [{"from": "human"}]}, "no content", "conversations[0]"),
    "a value null": (
        {"conversations": [{"from": "human", "value": None}, {"from": "gpt", "value": "a"}]},
        "no content",
        "messages[0]",
    ),
    "a call that is no JSON": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f(1)"}]},
        "tool calls",
        "messages[1].tool_calls[0]",
    ),
    "turns of two forms": (
        {"conversations": [{"from": "human", "value": "q"}, {"speaker": "gpt"}]},
        "no role",
        "messages[1]",
    ),
    "no output": ({"instruction": "q"}, "no content", "no output"),
    "an empty output": ({"instruction": "q", "output": ""}, "empty turn", "messages[1]"),
    "an output null": ({"instruction": "q", "output": None}, "no content", "messages[1]"),
    "an instruction a list": ({"instruction": ["q"], "output": "a"}, "content is no text", "instruction"),
    "an empty instruction": ({"instruction": "", "input": "", "output": "a"}, "empty turn", "messages[0]"),
    "a history of texts": ({"instruction": "q", "output": "a", "history": ["b"]}, "history", "pairs"),
    "a prompt and no list": ({"prompt": [ASKED], "completion": "a"}, "messages are no list", "completion"),
    "both kinds of calls": (
        messages(ASKED, {**CALL, "function_call": {"name": "g", "arguments": "{}"}}),
        "tool calls",
        "function_call",
    ),
    "functions and tools": (messages(ASKED, SAID, tools=[], functions=[]), "tools", "functions"),
    "two system texts": (
        messages({"role": "system", "content": "s"}, ASKED, SAID, system="t"),
        "two system texts",
        "field system",
    ),
    "variables of its own": (
        messages(ASKED, SAID, chat_template_kwargs={"enable_thinking": False}),
        "variables of its own",
        "--template-variable",
    ),
    "arguments too deep": (
        messages(ASKED, calls({"name": "f", "arguments": {"x": nested(80)}})),
        "nested too deeply",
        "messages[1]",
    ),
    "a prompt alone": ({"prompt": "q"}, "no known form", "'prompt'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong(name):
    record, reason, place = WRONG[name]
    found = conversation_of(orjson.loads(orjson.dumps(record)))
    assert isinstance(found, Rejected), found
    assert found.reason == reason
    assert place in found.fix
    assert found.fix.endswith(".")


def test_sixty_kinds():
    assert len(WRONG) >= 60


def roles(conversation):
    assert isinstance(conversation, Conversation), conversation
    return [(one["role"], one["content"]) for one in conversation.messages]


def test_a_system_text_beside_the_messages():
    found = conversation_of(messages(ASKED, SAID, system="s", functions=[{"name": "f"}]))
    assert roles(found)[0] == ("system", "s")
    assert found.tools == ({"name": "f"},)


def test_times_of_a_table_are_no_part_of_a_message():
    import datetime

    said = {**SAID, "at": datetime.datetime(2026, 1, 1), "weight": 1}
    assert conversation_of(messages(ASKED, said)).messages[1] == SAID
    record = messages(ASKED, calls({"name": "f", "arguments": {"x": datetime.datetime(2026, 1, 1)}}))
    assert conversation_of(record).reason == "no JSON value"


def test_openai():
    record = messages(
        {"role": "developer", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"role": "function", "name": "f", "content": ""},
        {"role": "assistant", "content": "first", "weight": 0},
        {"role": "user", "content": "again", "name": "me"},
        {"role": "assistant", "content": "last", "refusal": None, "tool_calls": [], "weight": 1},
        tools='[{"type": "function", "function": {"name": "f"}}]',
        id=7,
    )
    found = conversation_of(record)
    assert roles(found) == [
        ("system", "s"), ("user", "ab"), ("assistant", ""), ("tool", ""), ("assistant", "first"), ("user", "again"),
        ("assistant", "last"),
    ]  # fmt: skip
    assert found.messages[2]["tool_calls"] == [{"name": "f", "arguments": {"x": 1}}]
    assert found.tools == ({"type": "function", "function": {"name": "f"}},)
    assert found.untrained == {4}
    assert found.messages[6] == {"role": "assistant", "content": "last"}


def test_sharegpt():
    record = {
        "system": "s",
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": '[{"name": "f"}]',
    }
    found = conversation_of(record)
    assert roles(found) == [("system", "s"), ("user", "q"), ("assistant", ""), ("tool", "r"), ("assistant", "a")]
    assert found.messages[2]["tool_calls"] == [{"name": "f", "arguments": {"x": 1}}]
    assert roles(conversation_of({"conversations": [ASKED, SAID]})) == [("user", "q"), ("assistant", "a")]


def test_alpaca():
    record = {"instruction": "do", "input": "this", "output": "done", "history": [["q", "a"]], "system": ""}
    assert roles(conversation_of(record)) == [
        ("user", "q"), ("assistant", "a"), ("user", "do\nthis"), ("assistant", "done"),
    ]  # fmt: skip
    assert roles(conversation_of({"instruction": "do", "input": None, "output": "done"}))[0] == ("user", "do")


def test_prompt_and_completion():
    found = conversation_of({"prompt": [ASKED, SAID, ASKED], "completion": [SAID], "messages": None})
    assert roles(found) == [("user", "q"), ("assistant", "a")] * 2
    assert found.untrained == {1}
    assert roles(conversation_of({"prompt": "q", "completion": "a"})) == [("user", "q"), ("assistant", "a")]
