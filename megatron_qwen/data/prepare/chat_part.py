"""The conversations of a part: encoded, counted, and some of them kept for a comparison."""

from collections import Counter
from collections.abc import Iterator, Sequence

from megatron_qwen.data.chat.conversation import Conversation
from megatron_qwen.data.chat.encoding import ChatEncoder, EncodedConversation
from megatron_qwen.data.chat.template import TemplateRefuses
from megatron_qwen.data.prepare.part_file import Part
from megatron_qwen.data.prepare.plan import PreparationPlan
from megatron_qwen.data.text.blocks import Block, ChatDocument
from megatron_qwen.data.tokenizers.encoder import Encoder, TokenizerEncoder
from megatron_qwen.data.tokenizers.tokenizer import BpeTokenizer, load_tokenizer
from megatron_qwen.errors import DataError, Problem

# Conversations of every part that are rendered by Jinja and encoded by the tokenizer's own library as well.
_COMPARED = 4
_LONGEST_COMPARED = 1 << 14  # tokens


def chat_encoder(plan: PreparationPlan, encoder: Encoder, *, fast: bool) -> ChatEncoder:
    """Encodes the conversations of a plan.

    Args:
        plan: of conversations.
        encoder: text to ids.
        fast: whether plain conversations may be rendered without Jinja.

    Raises:
        DataError: answers cannot be told apart with this template, or this kind of tokenizer.
    """
    assert plan.chat is not None
    tokenizer = load_tokenizer(plan.tokenizer, end=plan.documents.end_token)
    if not isinstance(tokenizer, BpeTokenizer):
        fix = "is a SentencePiece model; conversations need a tokenizer.json (transformers can write one)."
        raise DataError(Problem(str(plan.tokenizer), None, fix))
    return ChatEncoder(
        plan.chat.template,
        encoder,
        tokenizer,
        as_text=plan.documents.control_as_text,
        fast=fast,
        unit=plan.chat.loss_unit,
        silent=plan.chat.silent,
    )


def keep_ready(plan: PreparationPlan, encoder: Encoder) -> None:
    """Makes what workers need before they are forked: they share its memory, and none makes its own."""
    _kept(plan, encoder, fast=not isinstance(encoder, TokenizerEncoder))


# By plan and encoder, which are kept with it so that their ids stay theirs.
_READY: dict[tuple[int, int, bool], tuple[PreparationPlan, Encoder, ChatEncoder]] = {}


def _kept(plan: PreparationPlan, encoder: Encoder, *, fast: bool) -> ChatEncoder:
    key = (id(plan), id(encoder), fast)
    if key not in _READY:
        _READY.clear()
        _READY[key] = plan, encoder, chat_encoder(plan, encoder, fast=fast)
    return _READY[key][2]


class ChatPart:
    """Encodes conversations, a block at a time.

    Args:
        plan: of the preparation.
        encoder: text to ids.

    Attributes:
        spelled: how often messages spell a control token, by its id.
    """

    def __init__(self, plan: PreparationPlan, encoder: Encoder) -> None:
        assert plan.chat is not None
        # The tokenizer's own library is taken where something was not as it should be: then Jinja renders as well.
        fast = not isinstance(encoder, TokenizerEncoder)
        self._encode, self._most = _kept(plan, encoder, fast=fast), plan.chat.most_tokens
        self._ids, self._unit = self._encode.control, plan.chat.loss_unit
        self._encoded: list[EncodedConversation] = []
        self.spelled: Counter[int] = Counter()

    def encode(self, block: Block, part: Part) -> None:
        """Takes the conversations out of a block; those that cannot be rendered become its bad records."""
        reasons = Counter(bad.reason or "other" for bad in block.bad)
        for document in block.texts:
            assert isinstance(document, ChatDocument)
            both = (document.conversation, *(() if document.other is None else (document.other,)))
            if any(one.hundredths for one in both) and self._unit == 1:
                block.bad.append(
                    document.bad("a message's weight is between 0 and 1; give --message-weights.", "weight")
                )
                reasons["weight"] += 1
                continue
            try:
                encoded = [self._encode(one) for one in both]
            except TemplateRefuses as error:
                reason = "the template refuses it"
                block.bad.append(document.bad(f"the chat template cannot render it: {error}.", reason))
                reasons[reason] += 1
                continue
            found = encoded[0] if len(encoded) == 1 else encoded[0].followed_by(encoded[1])
            if not all(one.trained for one in encoded):
                reason = "nothing to train"
                block.bad.append(document.bad("no token of it carries loss.", reason))
                reasons[reason] += 1
                continue
            if self._most is not None and max(len(one.ids) for one in encoded) > self._most:
                block.filtered += 1
                reasons[f"longer than {self._most:,} tokens"] += 1
                continue
            self._count(document.conversation, found, part)
            self._keep(both, encoded, part)
        block.texts.clear()
        part.reasons = dict(Counter(part.reasons) + reasons)

    def drained(self) -> Iterator[EncodedConversation]:
        """What was encoded since the last call."""
        encoded, self._encoded = self._encoded, []
        return iter(encoded)

    def _count(self, conversation: Conversation, found: EncodedConversation, part: Part) -> None:
        self._encoded.append(found)
        part.longest = max(part.longest, len(found.ids))
        part.trained += found.trained
        answers = sum(message["role"] == "assistant" for message in conversation.messages)
        part.answers += answers - len(conversation.untrained)
        for name, count in found.spelled.items():
            self.spelled[self._ids[name]] += count

    def _keep(self, both: Sequence[Conversation], encoded: Sequence[EncodedConversation], part: Part) -> None:
        """Keeps some conversations, to be rendered and encoded in another way."""
        for conversation, found in zip(both, encoded, strict=True):
            if len(part.chats) >= _COMPARED or len(found.ids) > _LONGEST_COMPARED:
                return
            part.chats.append(
                {
                    "messages": conversation.messages,
                    "tools": list(conversation.tools),
                    "untrained": sorted(conversation.untrained),
                    "hundredths": list(conversation.hundredths),
                    "ids": found.ids.tolist(),
                    "mask": found.mask.tolist(),
                }
            )
