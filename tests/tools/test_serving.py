"""Text as it comes, and calls of tools in it."""

import json

import pytest

from tools.generation.text_stream import TextStream
from tools.serving.tool_calls import begins_call, for_template, split_calls


def decode(ids):
    return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("stops", [(), ("\n\n",), ("END", "N!"), ("aaab",)])
@pytest.mark.parametrize(
    "text", ["plain", "é and 漢字 🙂 end", "aaaaab", "one\n\ntwo", "the EN and the END!", "\ufffd lone"]
)
def test_pieces_are_the_text(text, stops):
    stream = TextStream(decode, stops)
    pieces = [stream.add(byte) for byte in text.encode()]
    places = [text.find(stop) for stop in stops if stop in text]
    assert "".join(pieces) + stream.end() == (text[: min(places)] if places else text)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_a_tokenizer_that_leaves_out_the_first_space():
    words = [" one", " two", "", " three", " 3"]
    stream = TextStream(lambda ids: "".join(words[one] for one in ids).removeprefix(" "))
    assert [*(stream.add(word) for word in range(len(words))), stream.end()] == ["one", " two", "", " three", " 3", ""]


def test_tokens_are_decoded_a_few_at_a_time():
    most = [0]

    def counted(ids):
        most[0] = max(most[0], len(ids))
        return decode(ids)

    stream, text = TextStream(counted, ["never"]), "né 漢🙂 " * 500
    assert "".join(stream.add(byte) for byte in text.encode()) + stream.end() == text
    assert most[0] <= 8  # two characters


def test_calls():
    first = '<tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n</tool_call>'
    second = '<tool_call>\n{"name": "go", "arguments": "{}"}\n</tool_call>'
    content, calls = split_calls(f"I will.\n{first}\n{second}")
    assert content == "I will."
    assert [call["function"] for call in calls] == [
        {"name": "look", "arguments": '{"at": "é"}'},
        {"name": "go", "arguments": "{}"},
    ]
    assert len({call["id"] for call in calls}) == 2
    assert split_calls("no calls ") == ("no calls ", [])
    broken = "<tool_call>{not json}</tool_call> and <tool_call>[1]</tool_call>"
    assert split_calls(broken) == (broken, [])
    assert split_calls('<tool_call>{"name": "cut"') == ('<tool_call>{"name": "cut"', [])
    assert split_calls('<tool_call>{"name": "unclosed", "arguments": {}}')[1][0]["function"]["name"] == "unclosed"


@pytest.mark.parametrize(("text", "at"), [("abc", 3), ("abc<to", 3), ("a<tool_call>x", 1), ("a<b", 3), ("<", 0)])
def test_where_a_call_may_begin(text, at):
    assert begins_call(text) == at


def test_arguments_are_not_encoded_twice():
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    (message,) = for_template([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert message["tool_calls"][0]["function"]["arguments"] == {"at": 1}
    assert json.loads(call["function"]["arguments"]) == {"at": 1}
    broken = {**call, "function": {"name": "look", "arguments": "{"}}
    assert for_template([{"role": "assistant", "tool_calls": [broken]}])[0]["tool_calls"] == [broken]
