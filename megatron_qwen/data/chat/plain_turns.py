"""Renders plain conversations by what a template puts around a turn, learnt from it: some ten times as fast as Jinja.

A plain conversation has a system message, if any, at its beginning, and texts of user and assistant. Most templates,
Qwen2.5's among them, put the same words around every turn of a role. Whether one does is tried on conversations of many
shapes; a text that spells any word that the template compares with goes to Jinja. Preparation also renders some
conversations of every part of the input both ways (data/prepare/job.py).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import nodes

from megatron_qwen.data.chat.template import ChatTemplate, TemplateRefuses

_ROLES = ("user", "assistant")
_WORDS = ("alpha one", "beta 2", "gamma, three", "delta: 4")
# What templates are known to treat in their own way: spaces and line ends around a text, HTML, marks of other formats.
_ODD = (
    *(" a b ", "\nline\n", "\n\n", "tab\t", "<b>&amp;</b>", "{{ x }}{% y %}", "a\\n'\"", "0", ""),
    "\u00e9 \u6f22\u5b57 \U0001f642",
)


@dataclass(frozen=True)
class PlainTurns:
    """What stands around the turns of a template.

    Args:
        alone: in front of a conversation without a system message.
        system: in front of a system message at the beginning, and behind it.
        around: the same of a user's and an assistant's turn.
        compared: texts that the template compares with, or looks for.
    """

    alone: str
    system: tuple[str, str] | None
    around: Mapping[str, tuple[str, str]]
    compared: tuple[str, ...]

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str | None:
        """A conversation as text; None where it is not plain."""
        parts: list[str] = []
        around = self.around
        for place, message in enumerate(messages):
            role, content = message["role"], message.get("content")
            if len(message) != 2 or type(content) is not str:
                return None
            both = around.get(role)
            if both is None:
                if place or role != "system" or self.system is None:
                    return None
                both = self.system
            elif not place:
                parts.append(self.alone)
            before, behind = both
            parts += (before, content, behind)
        if self.compared:
            contents = "\0".join([message["content"] for message in messages])
            if any(text in contents for text in self.compared):
                return None
        return "".join(parts)


def learn(template: ChatTemplate) -> PlainTurns | None:
    """What a template puts around turns; None where that is not the same for all."""
    try:
        found = _learnt(template)
        if found is None:
            return None
        return found if all(found.render(one) in (None, template.render(one)) for one in _tried(found)) else None
    except TemplateRefuses:
        return None


def _learnt(template: ChatTemplate) -> PlainTurns | None:
    first, second, third, fourth = _WORDS
    turns = [("user", first), ("assistant", second), ("user", third), ("assistant", fourth)]
    text = template.render(_messages(turns))
    parts = _parted(text, _WORDS)
    if parts is None:
        return None
    # Behind a turn and before the next stands one text: how it is divided is seen where a turn is the last.
    behind_user = _parted(template.render(_messages(turns[:1])), _WORDS[:1])
    behind_assistant = _parted(template.render(_messages(turns[:2])), _WORDS[:2])
    if behind_user is None or behind_assistant is None:
        return None
    user_end, assistant_end = behind_user[-1], behind_assistant[-1]
    if not parts[1].startswith(user_end) or not parts[2].startswith(assistant_end):
        return None
    assistant, user = parts[1][len(user_end) :], parts[2][len(assistant_end) :]
    if not parts[0].endswith(user):
        return None
    alone = parts[0][: len(parts[0]) - len(user)]
    system = None
    with_system = _parted(template.render(_messages([("system", fourth), ("user", first)])), (fourth, first))
    if with_system is not None and with_system[1].endswith(user):
        system = (with_system[0], with_system[1][: len(with_system[1]) - len(user)])
    around = {"user": (user, user_end), "assistant": (assistant, assistant_end)}
    return PlainTurns(alone, system, around, _compared(template))


def _parted(text: str, words: Sequence[str]) -> list[str] | None:
    """What stands between words that a text has once each, in order."""
    parts = []
    for word in words:
        before, found, text = text.partition(word)
        if not found:
            return None
        parts.append(before)
    return [*parts, text]


def _tried(turns: PlainTurns) -> list[list[dict[str, str]]]:
    """Conversations of many shapes, and with odd texts in every place."""
    found = []
    for length in range(1, 5):
        for roles in itertools.product(_ROLES, repeat=length):
            one = [(role, f"{word} {place}") for place, (role, word) in enumerate(zip(roles, _WORDS, strict=False))]
            found += [one, [("system", "be brief"), *one], [("system", ""), *one]]
    usual = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")]
    for odd, place in itertools.product((*_ODD, *(f"x{text}y" for text in turns.compared)), range(len(usual))):
        one = list(usual)
        one[place] = (one[place][0], odd)
        found.append(one)
    return [_messages(one) for one in found]


def _messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def _compared(template: ChatTemplate) -> tuple[str, ...]:
    """Texts in a template that it does not simply write: operands of comparisons, arguments of methods and filters."""
    found = set()
    for node in template.tree.find_all((nodes.Compare, nodes.Call, nodes.Filter, nodes.Test, nodes.List, nodes.Dict)):
        found |= {one.value for one in node.find_all(nodes.Const) if isinstance(one.value, str)}
    values = [node.node for node in template.tree.find_all(nodes.Assign)]
    values += [one for node in template.tree.find_all(nodes.Macro) for one in node.defaults]
    for value in values:
        found |= {one.value for one in (value, *value.find_all(nodes.Const)) if isinstance(one, nodes.Const)}
    found = {one for one in found if isinstance(one, str)}
    names = {"role", "content", "tool_calls", "function", "name", "system", "tool"}
    return tuple(sorted(text for text in found - names - set(_ROLES) if text.strip()))
