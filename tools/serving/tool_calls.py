"""Calls of tools in an answer, as Qwen's chat template has the model write them."""

import json
import secrets
from collections.abc import Sequence
from typing import Any

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


def split_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Content and calls of an answer.

    A call is an object with ``name`` and ``arguments`` between two tags. What is no such object stays in the content,
    tags and all: whoever asked sees what the model wrote.

    Returns:
        The text outside of calls, without white space at its end, and OpenAI's objects of the calls.
    """
    content, calls, at = [], list[dict[str, Any]](), 0
    while (begin := text.find(_OPEN, at)) >= 0:
        end = text.find(_CLOSE, begin)
        body = text[begin + len(_OPEN) : end if end >= 0 else len(text)]
        call = _call(body)
        after = end + len(_CLOSE) if end >= 0 else len(text)
        content.append(text[at : begin if call is not None else after])
        if call is not None:
            calls.append(call)
        at = after
    content.append(text[at:])
    joined = "".join(content)
    return (joined.rstrip() if calls else joined), calls


def begins_call(text: str) -> int:
    """Where the first call begins, or where the end of the text may begin one; the length of the text if nowhere."""
    if (at := text.find(_OPEN)) >= 0:
        return at
    for size in range(min(len(_OPEN) - 1, len(text)), 0, -1):
        if _OPEN.startswith(text[-size:]):
            return len(text) - size
    return len(text)


def for_template(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with the arguments of calls as objects: OpenAI's are texts, which a template would encode again."""
    found = []
    for message in messages:
        calls = [
            {**call, "function": {**call["function"], "arguments": _parsed(call["function"]["arguments"])}}
            for call in message.get("tool_calls") or ()
        ]
        found.append({**message, "tool_calls": calls} if calls else message)
    return found


def _call(body: str) -> dict[str, Any] | None:
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or not isinstance(said.get("name"), str):
        return None
    arguments = said.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    if not text.isprintable() and any("\ud800" <= sign <= "\udfff" for sign in text):
        return None  # half of a surrogate pair, which no reply can hold
    function = {"name": said["name"], "arguments": text}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _parsed(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
