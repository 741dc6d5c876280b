"""Pairs of a chosen and a rejected answer, in the forms in which they are published.

- TRL: ``prompt``, ``chosen`` and ``rejected``: texts, messages or lists of messages; without ``prompt`` both are whole
  conversations, and what they have in common is the prompt.
- ShareGPT (LLaMA-Factory): ``conversations`` up to the question, ``chosen`` and ``rejected`` of from and value.
"""

from typing import Any

from megatron_qwen.data.chat.checks import checked
from megatron_qwen.data.chat.conversation import Conversation, Rejected
from megatron_qwen.data.chat.forms import sharegpt_messages

FIELDS = ("prompt", "chosen", "rejected", "conversations", "system", "tools")
_BOTH = ("chosen", "rejected")
Pair = tuple[Conversation, Conversation]


def pair_of(record: Any) -> Pair | Rejected:
    """The chosen and the rejected conversation of a record, or what is wrong with it."""
    if not isinstance(record, dict):
        return Rejected("no object", "is not a JSON object; a pair is one.")
    if missing := [name for name in _BOTH if record.get(name) is None]:
        found = ", ".join(map(repr, list(record)[:8])) or "none"
        return Rejected("no pair", f"has no {' and no '.join(missing)}: its fields are {found}.")
    prompt = _prompt(record)
    if isinstance(prompt, Rejected):
        return prompt
    answers = []
    for name in _BOTH:
        messages = _messages(record[name], name)
        if isinstance(messages, Rejected):
            return messages
        answers.append(messages)
    chosen, rejected = answers
    if prompt is None:
        same = 0
        while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
            same += 1
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    if chosen == rejected:
        return Rejected("no difference", "chosen and rejected are the same: nothing is preferred.")
    made = []
    for name, answer in zip(_BOTH, (chosen, rejected), strict=True):
        if not answer or not isinstance(answer[0], dict) or answer[0].get("role") != "assistant":
            return Rejected("no answer", f"{name} must begin with a message of the assistant behind the prompt.")
        one = checked([*prompt, *answer], record.get("tools"), len(prompt))
        if isinstance(one, Rejected):
            return Rejected(one.reason, f"{name}: {one.fix}")
        made.append(one)
    return made[0], made[1]


def _prompt(record: dict[str, Any]) -> list[Any] | Rejected | None:
    """Messages in front of both answers; None where the answers hold them."""
    there = [name for name in ("prompt", "conversations") if record.get(name) is not None]
    if len(there) > 1:
        return Rejected("several forms", "has both prompt and conversations: which is meant? Remove one.")
    if not there:
        return None
    if there == ["conversations"]:
        return sharegpt_messages({"conversations": record["conversations"], "system": record.get("system")})
    prompt = record["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        return Rejected("messages are no list", "prompt must be a text or a list of messages.")
    system = record.get("system")
    return [{"role": "system", "content": system}, *prompt] if system else prompt


def _messages(answer: Any, name: str) -> list[Any] | Rejected:
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    if isinstance(answer, dict):
        answer = [answer]
    if not isinstance(answer, list):
        return Rejected("messages are no list", f"{name} must be a text, a message or a list of messages.")
    if answer and isinstance(answer[0], dict) and "from" in answer[0]:
        return sharegpt_messages({"conversations": answer})
    return answer
