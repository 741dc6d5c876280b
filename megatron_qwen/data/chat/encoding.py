"""Conversations to ids and loss masks: the ids of transformers' apply_chat_template, the mask by position.

A tokenizer takes control tokens out of a text first and encodes what is between them, so a conversation may be encoded
piece by piece, and what a message spells is encoded as text, whatever stands around it. Where nothing is spelled the
whole text is encoded in one call, and answers are found by the places of the control tokens.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_qwen.data.chat.answers import AnswerForm, answer_form, marked_spans
from megatron_qwen.data.chat.conversation import Conversation
from megatron_qwen.data.chat.marks import AS_TEXT, any_of, marked, without
from megatron_qwen.data.chat.plain_turns import PlainTurns, learn
from megatron_qwen.data.chat.template import ChatTemplate, TemplateRefuses
from megatron_qwen.data.token_files.manifest import LOSS_BITS, MEMBER
from megatron_qwen.data.tokenizers.encoder import Encoder
from megatron_qwen.data.tokenizers.tokenizer import BpeTokenizer

_NAME, _ARGUMENT, _RESULT, _ID = "name8217", "argument8217", "result 8217", "call08217"
Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.uint8]


class Span(NamedTuple):
    """Characters [begin, end) of an answer, or a part of one, and how much its tokens count."""

    begin: int
    end: int
    weight: int


@dataclass(frozen=True)
class EncodedConversation:
    """Ids and mask of a conversation.

    Args:
        ids: [n].
        mask: how much the loss of a token counts, in 1 / unit: 0 where the assistant did not write it; and a bit
            where a further sequence of the document begins, [n].
        spelled: how often messages spell a control token, by its name.
    """

    ids: Ids
    mask: Mask
    spelled: Mapping[str, int]

    @cached_property
    def trained(self) -> int:
        """Tokens that carry loss."""
        return int(np.count_nonzero(self.mask & LOSS_BITS))

    def followed_by(self, other: "EncodedConversation") -> "EncodedConversation":
        """Both as the sequences of one document."""
        mask = np.concatenate((self.mask, other.mask))
        mask[len(self.ids)] |= MEMBER
        spelled = Counter(self.spelled) + Counter(other.spelled)
        return EncodedConversation(np.concatenate((self.ids, other.ids)), mask, spelled)


class ChatEncoder:
    """Encodes conversations.

    Args:
        template: of the tokenizer.
        encoder: text to ids.
        tokenizer: the reference, which knows the control tokens.
        as_text: whether control tokens that messages spell are text; else they are the tokens.
        fast: whether plain conversations may be rendered without Jinja.
        unit: mask of a token that counts whole.
        silent: pairs of texts; what an answer has from the first to the second carries no loss.

    Attributes:
        control: ids of control tokens by name.

    Raises:
        DataError: the template's answers cannot be told apart (``answer_form``).
    """

    def __init__(
        self,
        template: ChatTemplate,
        encoder: Encoder,
        tokenizer: BpeTokenizer,
        *,
        as_text: bool = True,
        fast: bool = True,
        unit: int = 1,
        silent: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._unit, self._silent = unit, tuple(silent)
        self._template, self._encoder, self._tokenizer, self._as_text = template, encoder, tokenizer, as_text
        self.control = dict(tokenizer.spellable)
        names = tuple(self.control)
        self._form = answer_form(template, names, tokenizer.written)
        self._names = any_of(names)
        self._cut = re.compile(f"({self._names.pattern})")
        # A model writes these itself, where its tokenizer does not call them special: thinking, calls of tools.
        own = tokenizer.written
        self._not_own = any_of([name for name in names if name not in own])
        self._plain: _PlainEncoding | None = None
        if fast and self._form is not None and (turns := learn(template)) is not None:
            self._plain = _PlainEncoding.of(turns, self._form, self._cut, self.control, encoder, unit)

    def __call__(self, conversation: Conversation) -> EncodedConversation:
        """Encodes.

        Raises:
            TemplateRefuses: the template cannot render it, or its answers are not to be found.
        """
        if conversation.hundredths and self._unit == 1:
            raise TemplateRefuses("a message counts in part, which --message-weights allows")
        if self._plain is not None and not conversation.tools and not self._may_be_silent(conversation):
            found = self._plain(conversation)
            if found is not None:
                return found
        return self._by_jinja(conversation)

    def _may_be_silent(self, conversation: Conversation) -> bool:
        """Whether an answer has a part without loss, which a template may also begin before the answer."""
        asks = "" if self._form is None else self._form.asks
        texts = [asks, *(str(message.get("content")) for message in conversation.messages)]
        return any(end in text for pair in self._silent for end in pair for text in texts)

    def _by_jinja(self, conversation: Conversation) -> EncodedConversation:
        messages: Sequence[Mapping[str, Any]] = conversation.messages
        tools: Any = conversation.tools
        spelled: dict[str, int] = {}
        if self._as_text:
            messages, tools = [self._marked(message) for message in messages], marked(list(tools), self._names)
        if not self._renders_calls and any("tool_calls" in message for message in messages):
            raise TemplateRefuses("it does not write calls of tools")
        text = self._template.render(messages, tools)
        text, spans = self._spans(text, conversation)
        asks = "" if self._form is None else self._form.asks
        spans = [part for span in spans for part in _without_silent(text, span, self._silent, asks)]
        if self._as_text and (messages != conversation.messages or tools != list(conversation.tools)):
            self._require_as_unmarked(text, conversation)
        if AS_TEXT in text:
            spelled = Counter(found[0] for found in self._names.finditer(without(text)))
            spelled.subtract(found[0] for found in self._names.finditer(text))
            spelled = {name: count for name, count in spelled.items() if count > 0}
        ids, mask = self._encoded(text, spans)
        return EncodedConversation(ids, mask, spelled)

    @cached_property
    def _renders_calls(self) -> bool:
        """Whether the template writes a call of a tool, and its result."""
        call = {"type": "function", "id": _ID, "function": {"name": _NAME, "arguments": {_ARGUMENT: 1}}}
        asked: Mapping[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
        talk: list[Mapping[str, Any]] = [
            {"role": "user", "content": "?"},
            asked,
            {"role": "tool", "name": _NAME, "tool_call_id": _ID, "content": _RESULT},
        ]
        try:
            text = self._template.render([*talk, {"role": "assistant", "content": "!"}])
        except TemplateRefuses:
            return True  # it may want more than this probe has, and refuses what it cannot write
        return all(word in text for word in (_NAME, _ARGUMENT, _RESULT))

    def _require_as_unmarked(self, text: str, conversation: Conversation) -> None:
        """Raises TemplateRefuses where marks change more than themselves: a template may compare what they are in."""
        if AS_TEXT in text and self._tokenizer.strips:
            raise TemplateRefuses("a message spells a control token, and those of this tokenizer take spaces along")
        plain, _ = marked_spans(self._template.render(conversation.messages, conversation.tools))
        if without(text) != plain:
            raise TemplateRefuses("a message spells a control token that the template looks for")

    def _marked(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        names = self._not_own if message["role"] == "assistant" else self._names
        return {name: value if name == "role" else marked(value, names) for name, value in message.items()}

    def _spans(self, text: str, conversation: Conversation) -> tuple[str, list[Span]]:
        """A text without marks, and the characters [a, b) of its answers, each with its weight."""
        answers = [place for place, one in enumerate(conversation.messages) if one["role"] == "assistant"]
        text, spans = marked_spans(text)
        if self._form is not None:
            spans = self._form.spans(text, len(answers))
        weights = dict.fromkeys(conversation.untrained, 0) | dict(conversation.hundredths)
        if weights and len(spans) != len(answers):
            raise TemplateRefuses("it marks other parts than whole messages of the assistant, which count differently")
        own = [weights.get(place, self._unit) for place in answers] if weights else [self._unit] * len(spans)
        return text, [Span(*span, weight) for span, weight in zip(spans, own, strict=True) if weight]

    def _encoded(self, text: str, spans: Sequence[Span]) -> tuple[Ids, Mask]:
        ids: list[Ids] = [np.zeros(0, dtype=np.int32)]
        masks: list[Mask] = [np.zeros(0, dtype=np.uint8)]
        at = 0
        for number, piece in enumerate(self._cut.split(text)):
            begin, end = at, at + len(piece)
            at = end
            if number % 2:
                ids.append(np.asarray([self.control[piece]], dtype=np.int32))
                own_weight = sum(span.weight for span in spans if span.begin <= begin and end <= span.end)
                masks.append(np.full(1, own_weight, dtype=np.uint8))
            elif piece:
                own = self._ids(piece)
                mask = np.zeros(len(own), dtype=np.uint8)
                for a, b, weight in spans:
                    if a < end and b > begin:
                        mask[self._tokens(piece, own, a - begin) : self._tokens(piece, own, b - begin)] = weight
                ids.append(own)
                masks.append(mask)
        found, mask = np.concatenate(ids), np.concatenate(masks)
        if AS_TEXT in text or np.array_equal(found, whole := self._ids(text)):
            return found, mask
        # A control token of this tokenizer takes spaces beside it along.
        places = self._tokenizer.offsets(text)
        if len(places) != len(whole):
            whole = np.asarray(self._tokenizer.encode_batch([text])[0], dtype=np.int32)
        inside = [sum(weight for a, b, weight in spans if a <= begin < b) for begin, _ in places]
        return whole, np.asarray(inside, dtype=np.uint8)

    def _ids(self, piece: str) -> Ids:
        return self._encoder.ids(without(piece), as_text=AS_TEXT in piece)

    def _tokens(self, piece: str, ids: Ids, characters: int) -> int:
        """How many tokens of a piece begin before a character of it: one that crosses it was not the model's choice."""
        if characters <= 0:
            return 0
        if characters >= len(piece):
            return len(ids)
        head = self._ids(piece[:characters])
        if np.array_equal(ids[: len(head)], head):
            return len(head)
        crossed = len(without(piece[:characters]))
        places = self._tokenizer.offsets(without(piece), control_as_text=AS_TEXT in piece)
        return sum(begin < crossed for begin, _ in places)


def _without_silent(text: str, span: Span, silent: Sequence[tuple[str, str]], asks: str) -> list[Span]:
    """The parts of an answer that carry loss.

    Args:
        text: rendered.
        span: of the answer.
        silent: pairs of texts; from the first to the second there is no loss.
        asks: what the template writes to ask for an answer: it may hold the first of a pair already.

    Raises:
        TemplateRefuses: one of a pair is there without the other, or is marked as text although it is a token.
    """
    if not silent:
        return [span]
    if AS_TEXT in text[span.begin : span.end] and any(
        without(text[span.begin : span.end]).count(end) != text.count(end, span.begin, span.end)
        for pair in silent
        for end in pair
    ):
        raise TemplateRefuses("its text is to have no loss between control tokens: give --control-tokens encode")
    begins = text.endswith(asks, 0, span.begin)
    opened = [last for first, last in silent if begins and asks.rfind(first) > asks.rfind(last)]
    parts, at = [], span.begin
    if opened:
        end = text.find(opened[0], at, span.end)
        if end < 0:
            raise TemplateRefuses(f"an answer has no {opened[0]}, which the prompt for it waits for")
        at = end + len(opened[0])
    while True:
        found = [(text.find(first, at, span.end), first, last) for first, last in silent]
        begin, first, last = min((one for one in found if one[0] >= 0), default=(span.end, "", ""))
        if any(text.find(end, at, begin) >= 0 for _, end in silent):
            raise TemplateRefuses("an answer has the end of a part without loss, and not its beginning")
        parts.append(Span(at, begin, span.weight))
        if begin == span.end:
            return [part for part in parts if part.begin < part.end]
        end = text.find(last, begin + len(first), span.end)
        if end < 0:
            raise TemplateRefuses(f"an answer has {first} without {last}")
        at = end + len(last)


@dataclass(frozen=True)
class _PlainEncoding:
    """Plain conversations in one call of the encoder.

    Args:
        turns: how they are rendered.
        encoder: text to ids.
        first: control tokens in front of the first turn, without and with a system message.
        count: control tokens of a turn by role.
        before: of them in front of the text, by role.
        head: ids between the last control token in front of an answer and the answer.
        offsets: 0, 1 ... of them.
        end: id that ends an answer.
        least: least id of a control token.
        control: whether an id is one of control, [largest + 1].
        all_above: whether every id from the least on is.
        unit: mask of a token that counts whole.
    """

    turns: PlainTurns
    encoder: Encoder
    first: tuple[int, int]
    count: Mapping[str, int]
    before: int
    head: Ids
    offsets: npt.NDArray[np.int64]
    end: int
    least: int
    control: npt.NDArray[np.bool_]
    all_above: bool
    unit: int

    @classmethod
    def of(
        cls,
        turns: PlainTurns,
        form: AnswerForm,
        cut: re.Pattern[str],
        control: Mapping[str, int],
        encoder: Encoder,
        unit: int,
    ) -> "_PlainEncoding | None":
        """None where answers do not begin and end in the way that this finds them."""
        asks, behind = turns.around["assistant"]
        if asks != form.asks or not behind.startswith(form.ends):
            return None
        asked = list(cut.finditer(asks))
        text = asks[asked[-1].end() :]
        head = encoder.ids(text, as_text=False) if text else np.zeros(0, dtype=np.int32)

        def tokens(*texts: str) -> int:
            return sum(len(cut.findall(text)) for text in texts)

        is_control = np.zeros(max(control.values()) + 1, dtype=np.bool_)
        is_control[list(control.values())] = True
        return cls(
            turns,
            encoder,
            (tokens(turns.alone), 0 if turns.system is None else tokens(*turns.system)),
            {role: tokens(*texts) for role, texts in turns.around.items()},
            len(asked),
            head,
            np.arange(len(head)),
            control[form.ends],
            min(control.values()),
            is_control,
            bool(is_control[min(control.values()) :].all()) and encoder.vocab_size <= len(is_control),
            unit,
        )

    def __call__(self, conversation: Conversation) -> EncodedConversation | None:
        """A plain conversation; None where it is none, or spells a control token."""
        messages = conversation.messages
        text = self.turns.render(messages)
        if text is None:
            return None
        ids = self.encoder.ids(text, as_text=False)
        places = np.flatnonzero(ids >= self.least)
        if not self.all_above:
            above = ids[places]
            places = places[(above < len(self.control)) & self.control[np.minimum(above, len(self.control) - 1)]]
        is_system = messages[0]["role"] == "system"
        at = self.first[is_system]
        opened, closed, weights = [], [], list[int]()
        parts = dict(conversation.hundredths)
        count, before, untrained = self.count, self.before, conversation.untrained
        for place, message in enumerate(messages):
            role = message["role"]
            if role == "system":
                continue
            if role == "assistant" and place not in untrained:
                opened.append(at + before - 1)
                closed.append(at + before)
                weights.append(parts.get(place, self.unit))
            at += count[role]
        if at != len(places):
            return None
        starts, stops = places[opened] + 1, places[closed]
        heads = starts[:, None] + self.offsets
        if not ((ids[heads] == self.head).all() and (ids[stops] == self.end).all()):
            return None  # a token goes on into the answer
        starts += len(self.head)
        change = np.zeros(len(ids) + 1, dtype=np.int8)
        change[starts] = weights
        change[stops + 1] -= np.asarray(weights, dtype=np.int8)
        return EncodedConversation(ids, np.cumsum(change[:-1], dtype=np.int8).view(np.uint8), {})
