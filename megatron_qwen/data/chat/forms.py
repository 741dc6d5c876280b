"""Recognises the forms in which conversations are published, and makes messages of them.

- OpenAI: ``messages`` of role and content, ``tools``; also ``prompt`` and ``completion``, two lists of messages, of
  which the first carries no loss (TRL).
- ShareGPT: ``conversations`` of from and value, ``system``, ``tools`` as a JSON text (LLaMA-Factory).
- Alpaca: ``instruction``, ``input``, ``output``, ``system``, ``history``.
"""

from typing import Any

import orjson

from megatron_qwen.data.chat.checks import checked
from megatron_qwen.data.chat.conversation import Conversation, Rejected

FORMS = ("messages", "prompt", "conversations", "instruction")
# All that a conversation is made of.
_OTHERS = ("completion", "tools", "functions", "system", "input", "output", "history", "chat_template_kwargs")
FIELDS = (*FORMS, *_OTHERS)
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}


def conversation_of(record: Any) -> Conversation | Rejected:
    """The conversation of a record, or what is wrong with it."""
    if not isinstance(record, dict):
        return Rejected("no object", "is not a JSON object; a conversation is one.")
    # Columns that a table has for other rows are null.
    there = [name for name in FORMS if record.get(name) is not None]
    if "prompt" in there and "completion" not in record:
        there.remove("prompt")
    if not there:
        wanted = "messages (OpenAI), conversations (ShareGPT), or instruction and output (Alpaca)"
        found = ", ".join(map(repr, list(record)[:8])) or "none"
        return Rejected("no known form", f"has no conversation: its fields are {found}; wanted are {wanted}.")
    if record.get("chat_template_kwargs"):
        fix = (
            "has chat_template_kwargs, which hold for one record here: give --template-variable for all, or divide it."
        )
        return Rejected("variables of its own", fix)
    if len(there) > 1:
        return Rejected("several forms", f"has both {there[0]} and {there[1]}: which is meant? Remove one.")
    made = _MAKERS[there[0]](record)
    return made if isinstance(made, Rejected) else checked(*made)


_Made = tuple[list[Any], Any, int] | Rejected  # messages, tools, messages that carry no loss


def _openai(record: dict[str, Any]) -> _Made:
    messages = record["messages"]
    if (system := record.get("system")) and isinstance(messages, list):
        if messages and isinstance(messages[0], dict) and messages[0].get("role") in ("system", "developer"):
            return Rejected("two system texts", "has a field system and a system message; remove one.")
        messages = [{"role": "system", "content": system}, *messages]
    if record.get("functions") is not None and record.get("tools") is not None:
        return Rejected("tools", "has both functions and tools; remove one.")
    tools = record.get("functions") if record.get("tools") is None else record["tools"]
    return messages, tools, 0


def _prompt_and_completion(record: dict[str, Any]) -> _Made:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        prompt = [{"role": "user", "content": prompt}]
        completion = [{"role": "assistant", "content": completion}]
    for name, part in (("prompt", prompt), ("completion", completion)):
        if not isinstance(part, list):
            return Rejected("messages are no list", f"{name} must be a list of messages.")
    return prompt + completion, record.get("tools"), len(prompt)


def sharegpt_messages(record: dict[str, Any]) -> list[Any] | Rejected:
    """The messages of ShareGPT's form."""
    made = _sharegpt(record)
    return made if isinstance(made, Rejected) else made[0]


def _sharegpt(record: dict[str, Any]) -> _Made:
    turns, messages = record["conversations"], list[Any]()
    if not isinstance(turns, list):
        return Rejected("messages are no list", "conversations must be a list of turns.")
    system = record.get("system")
    if system is not None and system != "":
        messages.append({"role": "system", "content": system})
    for place, turn in enumerate(turns):
        if not isinstance(turn, dict) or "from" not in turn:
            messages.append(turn)  # some have role and content under this name; others are refused as messages
            continue
        role = _SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            known = ", ".join(_SHAREGPT_ROLES)
            return Rejected("unknown role", f"conversations[{place}].from is {turn['from']!r}; known are {known}.")
        if "value" not in turn:
            return Rejected("no content", f"conversations[{place}] has no value.")
        if role == "call":
            calls = _parsed(turn["value"])
            calls = calls if isinstance(calls, list) else [calls]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        else:
            messages.append({"role": role, "content": turn["value"]})
        if "weight" in turn:
            messages[-1]["weight"] = turn["weight"]
    return messages, record.get("tools"), 0


def _alpaca(record: dict[str, Any]) -> _Made:
    if "output" not in record:
        return Rejected("no content", "has an instruction and no output.")
    parts = [record["instruction"], record.get("input")]
    if not all(isinstance(part, str) for part in parts if part is not None):
        return Rejected("content is no text", "instruction and input must be texts.")
    messages: list[Any] = []
    if record.get("system"):
        messages.append({"role": "system", "content": record["system"]})
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        return Rejected("history", "history must be a list of pairs of a question and an answer.")
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": "\n".join(part for part in parts if part)})
    messages.append({"role": "assistant", "content": record["output"]})
    return messages, record.get("tools"), 0


def _parsed(value: Any) -> Any:
    """What a JSON text says; itself where it is none, which the checks refuse."""
    try:
        return orjson.loads(value) if isinstance(value, str) else value
    except orjson.JSONDecodeError:
        return value


_MAKERS = {"messages": _openai, "prompt": _prompt_and_completion, "conversations": _sharegpt, "instruction": _alpaca}
