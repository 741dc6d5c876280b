"""Where the answers of the assistant stand in a rendered conversation.

An answer goes from the end of what a template writes to ask for one (its generation prompt) up to and including the
control token that ends a turn: what a model writes, and where it stops. Both are learnt from the template by rendering.
A template without such tokens must mark answers itself, by the tag ``generation``; Hugging Face's training templates
do, but some of them count what a model never writes, such as the line end behind the last token.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from megatron_qwen.data.chat.marks import BEGIN_ANSWER, END_ANSWER, any_of
from megatron_qwen.data.chat.template import ChatTemplate, TemplateRefuses
from megatron_qwen.errors import DataError, Problem

_ASKED, _SAID = "question", "answer 8217"
_QUESTION = {"role": "user", "content": _ASKED}


@dataclass(frozen=True)
class AnswerForm:
    """How answers begin and end in a template.

    Args:
        asks: the generation prompt, whole.
        begins: its part up to a further control token, with which every answer begins, and no other turn.
        ends: control token that ends a turn.
        foreign: finds control tokens that no answer holds: the template's own of other turns.
    """

    asks: str
    begins: str
    ends: str
    foreign: re.Pattern[str]

    def turn_tokens(self, control: Mapping[str, int]) -> dict[str, int]:
        """Ids of the control tokens that ask for an answer and end it, by name."""
        return {name: index for name, index in sorted(control.items()) if name in self.asks or name == self.ends}

    def spans(self, text: str, answers: int) -> list[tuple[int, int]]:
        """Characters [a, b) of every answer.

        Args:
            text: rendered; control tokens that messages spell are marked.
            answers: messages of the assistant.

        Raises:
            TemplateRefuses: they are not all there.
        """
        found, at = [], 0
        while (begin := text.find(self.begins, at)) >= 0:
            whole = text.startswith(self.asks, begin)
            start = begin + len(self.asks if whole else self.begins)
            end = text.find(self.ends, start)
            if end < 0:
                raise TemplateRefuses(f"an answer has no {self.ends} at its end")
            if (other := self.foreign.search(text, start, end)) is not None:
                raise TemplateRefuses(f"{other[0]} stands between the beginning of an answer and its end")
            found.append((start, end + len(self.ends)))
            at = end + len(self.ends)
        if len(found) != answers:
            raise TemplateRefuses(f"it renders {len(found)} answers for {answers} messages of the assistant")
        return found


def answer_form(template: ChatTemplate, control: Collection[str], written: Collection[str] = ()) -> AnswerForm | None:
    """How a template begins and ends answers; None where it marks them itself and has no control tokens there.

    Args:
        template: of the tokenizer.
        control: names of its control tokens.
        written: those of them that an answer may hold.

    Raises:
        DataError: neither is the case, or the template renders no plain conversation.
    """
    names = any_of(control)
    try:
        asked = template.render([_QUESTION])
        asks = template.render([_QUESTION], begin_answer=True)
        said = template.render([_QUESTION, {"role": "assistant", "content": _SAID}])
    except TemplateRefuses as error:
        raise DataError(Problem("chat_template", None, f"renders no question and answer: {error}.")) from None
    asks = _behind(names, asked, asks)
    place = said.rfind(_SAID)
    if place < 0:
        raise DataError(Problem("chat_template", None, "leaves out what an assistant says as a plain text."))
    ends = names.search(said, place + len(_SAID))
    tokens = list(names.finditer(asks))
    if not tokens or ends is None:
        if template.marks_answers:
            return None
        what = "ends an answer with" if tokens else "asks for an answer with"
        fix = f"{what} no control token, and has no tag `generation`: what the assistant wrote cannot be told apart."
        raise DataError(Problem("chat_template", None, fix))
    parts = [asks[: token.start()] for token in tokens[1:]]
    begins = next((part for part in (*parts, asks) if part not in asked), None)
    if begins is None:
        fix = "asks for an answer with what stands in front of other turns as well: answers cannot be told apart."
        raise DataError(Problem("chat_template", None, fix))
    foreign = [name for name in control if name not in written and name != ends[0]]
    return AnswerForm(asks, begins, ends[0], any_of(foreign))


def _behind(names: re.Pattern[str], first: str, second: str) -> str:
    """What the second text has behind the pieces that both begin with; some templates end the first with a token."""
    cut = re.compile(f"({names.pattern})")
    one, other = cut.split(first), cut.split(second)
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    rest = other[same:]
    if same < min(len(one), len(other)) and other[same].startswith(one[same]):
        rest[0] = other[same][len(one[same]) :]
    return "".join(rest)


def marked_spans(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A rendered text without the marks of the tag ``generation``, and the characters [a, b) between them."""
    parts, spans, at = [], [], 0
    for piece in text.split(BEGIN_ANSWER):
        inside, mark, behind = piece.partition(END_ANSWER)
        if mark:
            spans.append((at, at + len(inside)))
        parts += [inside, behind]
        at += len(inside) + len(behind)
    return "".join(parts), spans
