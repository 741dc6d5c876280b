"""What a conversation must be to be trained on: each mistake has a reason, for counts, and says its place."""

import re
from collections.abc import Iterator
from typing import Any

import orjson

from megatron_qwen.data.chat.conversation import ROLES, Conversation, Rejected

_OTHER_NAMES = {"developer": "system", "function": "tool"}  # OpenAI's newer and older words
# Names of what the assistant thought; templates read the first, some the second, as transformers gives them.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_READ = frozenset(("role", "content", "tool_calls", "tool_call_id", "name", "weight", "function_call", *_REASONING))
_JSON = (str, int, float, bool, list, dict)
_DEEPEST = 64
WHOLE = 100  # hundredths
_ROUNDING = 1e-9
# Unicode keeps these for programs' own use; rendering takes some of them as marks (marks.py).
_NO_CHARACTERS = re.compile("[\ufdd0-\ufdef]")


class _Wrong(Exception):
    """Carries a Rejected."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.found = Rejected(reason, fix)


def checked(messages: Any, tools: Any, prompt: int) -> Conversation | Rejected:
    """A conversation of messages, or what is wrong with them.

    Args:
        messages: with role and content, as OpenAI has them.
        tools: a list, or a JSON text of one; None for none.
        prompt: so many messages at the beginning carry no loss.
    """
    try:
        return _checked(messages, tools, prompt)
    except _Wrong as wrong:
        return wrong.found


def _checked(messages: Any, tools: Any, prompt: int) -> Conversation:
    if not isinstance(messages, list):
        raise _Wrong("messages are no list", "messages must be a list.")
    if not messages:
        raise _Wrong("no messages", "has no messages.")
    made, untrained, answers, parts = [], set[int](), 0, list[tuple[int, int]]()
    calls: _Calls | None = None  # of the assistant's last message, while results may come
    for place, message in enumerate(messages):
        # Nearly all messages: two fields, and a text with something in it.
        if type(message) is dict and len(message) == 2:
            role, content = message.get("role"), message.get("content")
            plain = type(content) is str and (role == "user" or role == "assistant")
            if plain and content and not content.isspace() and (content.isascii() or _has_characters(content)):
                calls = None
                made.append(message)
                if role == "assistant":
                    answers += 1
                    if place < prompt:
                        untrained.add(place)
                continue
        where = f"messages[{place}]"
        one, weight = _message(message, where)
        _require_characters(one, where)
        role = one["role"]
        if role == "tool":
            if calls is None:
                raise _Wrong("tool result without a call", f"{where} is a result of a tool, and no call is open.")
            calls.take(one, where)
        else:
            calls = _Calls(one["tool_calls"]) if "tool_calls" in one else None
        if role == "assistant":
            answers += 1
            if place < prompt or weight == 0:
                untrained.add(place)
            elif weight < WHOLE:
                parts.append((place, weight))
        made.append(one)
    if answers == len(untrained):
        what = "has no message of the assistant" if not answers else "has no message of the assistant with a loss"
        raise _Wrong("nothing to train", f"{what}: nothing would be learnt from it.")
    return Conversation(made, _tools(tools), frozenset(untrained), tuple(parts))


class _Calls:
    """Calls of tools that wait for results."""

    def __init__(self, calls: list[dict[str, Any]]) -> None:
        self._ids = {str(call["id"]) for call in calls if call.get("id") is not None}
        self._left = len(calls)

    def take(self, result: dict[str, Any], where: str) -> None:
        """Takes a result."""
        name = result.get("tool_call_id")
        if name is not None and self._ids:
            if str(name) not in self._ids:
                raise _Wrong("tool result without a call", f"{where}.tool_call_id is {name!r}; no open call has it.")
            self._ids.discard(str(name))
        self._left -= 1
        if self._left < 0:
            raise _Wrong("tool result without a call", f"{where} is one result more than there were calls.")


def _message(message: Any, where: str) -> tuple[dict[str, Any], int]:
    """A message as templates take it, and its weight in hundredths."""
    if not isinstance(message, dict):
        raise _Wrong("message is no object", f"{where} must be an object with role and content.")
    if "role" not in message:
        raise _Wrong("no role", f"{where} has no role.")
    role = message["role"]
    role = _OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise _Wrong("unknown role", f"{where}.role is {role!r}; known are {', '.join(ROLES)}.")
    # Null is how a table says that a row has no such field.
    one = {
        name: value
        for name, value in message.items()
        # Of a table a row may have times and the like beside what a template reads.
        if (value is not None and (name in _READ or isinstance(value, _JSON))) or name == "content"
    }
    one["role"] = role
    weight = one.pop("weight", 1)
    if (
        not isinstance(weight, int | float)
        or not 0 <= weight <= 1
        or abs(weight * WHOLE - round(weight * WHOLE)) > _ROUNDING
    ):
        raise _Wrong("weight", f"{where}.weight is {weight!r}; it must be from 0 to 1, in hundredths.")
    thought = next((one[name] for name in _REASONING if name in one), None)
    if thought is not None:
        if not isinstance(thought, str) or role != "assistant":
            raise _Wrong("reasoning", f"{where}: reasoning must be a text, of the assistant.")
        one = {"thinking": thought, **one, "reasoning_content": thought}
    if "function_call" in one and one.get("tool_calls"):
        raise _Wrong("tool calls", f"{where} has both function_call and tool_calls; remove one.")
    if "function_call" in one:
        one["tool_calls"] = [one.pop("function_call")]
    calls = one.get("tool_calls")
    if calls == []:
        del one["tool_calls"]
    elif calls is not None:
        if role != "assistant":
            raise _Wrong("tool calls", f"{where} has tool_calls and is of role {role}; the assistant alone calls.")
        if not isinstance(calls, list):
            raise _Wrong("tool calls", f"{where}.tool_calls must be a list.")
        one["tool_calls"] = [_call(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(calls)]
    one["content"] = _content(one, where)
    return one, round(weight * WHOLE)


def _content(message: dict[str, Any], where: str) -> str:
    role, content = message["role"], message.get("content")
    if content is None:
        if "tool_calls" in message:
            return ""
        raise _Wrong("no content", f"{where} has no content.")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{number}]") for number, part in enumerate(content))
    if not isinstance(content, str):
        raise _Wrong("content is no text", f"{where}.content must be a text; it is of type {type(content).__name__}.")
    if not content.strip() and role in ("user", "assistant") and "tool_calls" not in message:
        raise _Wrong("empty turn", f"{where}: the {role} says nothing.")
    return content


def _part(part: Any, where: str) -> str:
    """A part of a content that is a list, as OpenAI has it for pictures."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        raise _Wrong("content is no text", f"{where} is of type {kind!r}; this model reads text alone.")
    text: str = part["text"]
    return text


def _call(call: Any, where: str) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict):
        raise _Wrong("tool calls", f"{where} must be an object with a function.")
    name, arguments = inner.get("name"), inner.get("arguments", {})
    if not isinstance(name, str) or not name:
        raise _Wrong("tool calls", f"{where} has no name of a function.")
    if isinstance(arguments, str):  # OpenAI's form; templates would encode it a second time
        try:
            arguments = orjson.loads(arguments or "{}")
        except orjson.JSONDecodeError as error:
            raise _Wrong("arguments are no JSON", f"{where}: the arguments are not JSON ({error}).") from None
    if not isinstance(arguments, dict):
        raise _Wrong("arguments are no object", f"{where}: the arguments must be a JSON object.")
    inner = {**inner, "name": name, "arguments": arguments}
    return {**call, "function": inner} if "function" in call else inner


def _tools(tools: Any) -> tuple[dict[str, Any], ...]:
    if isinstance(tools, str):
        try:
            tools = orjson.loads(tools) if tools.strip() else None
        except orjson.JSONDecodeError as error:
            raise _Wrong("tools", f"tools is a text and not JSON ({error}).") from None
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise _Wrong("tools", "tools must be a list.")
    for number, tool in enumerate(tools):
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise _Wrong("tools", f"tools[{number}] must be an object with the name of a function.")
    _require_characters(tools, "tools")
    return tuple(tools)


def _has_characters(text: str) -> bool:
    return _NO_CHARACTERS.search(text) is None


def _require_characters(value: Any, where: str) -> None:
    for text in _texts(value, where, 0):
        if not text.isascii() and (found := _NO_CHARACTERS.search(text)) is not None:
            code = f"U+{ord(found[0]):04X}"
            raise _Wrong("no character", f"{where} holds {code}, which Unicode keeps for programs; remove it.")


def _texts(value: Any, where: str, depth: int) -> Iterator[str]:
    """All texts in a JSON value; raises _Wrong where it is none, or too deep for the programs that take it further."""
    if depth > _DEEPEST:
        raise _Wrong("nested too deeply", f"{where} is nested more than {_DEEPEST} levels deep.")
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from _texts(name, where, depth)
            yield from _texts(one, where, depth + 1)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one, where, depth + 1)
    elif value is not None and not isinstance(value, _JSON):
        raise _Wrong("no JSON value", f"{where} holds a {type(value).__name__}, which is no value of JSON.")
