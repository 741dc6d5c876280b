"""How the conversations of a preparation become ids."""

import datetime
from dataclasses import dataclass
from typing import Any

from megatron_qwen.data.chat.checks import WHOLE
from megatron_qwen.data.chat.template import ChatTemplate
from megatron_qwen.data.token_files.manifest import LOSS_UNIT


@dataclass(frozen=True)
class ChatOptions:
    """How conversations become ids.

    Args:
        template: of the tokenizer.
        most_tokens: a longer conversation is left out, and counted; None leaves none out.
        weighted: whether messages may count in part: loss masks are then in hundredths.
        silent: pairs of texts; what an answer has from the first to the second carries no loss.
    """

    template: ChatTemplate
    most_tokens: int | None = None
    weighted: bool = False
    silent: tuple[tuple[str, str], ...] = ()

    @property
    def loss_unit(self) -> int:
        """The value of a loss mask where a token counts whole."""
        return WHOLE if self.weighted else 1

    def identity(self) -> dict[str, Any]:
        """What decides the ids."""
        found = {**self.template.identity, "most_tokens": self.most_tokens}
        if self.weighted:
            found[LOSS_UNIT] = self.loss_unit
        if self.silent:
            found["no_loss_between"] = [list(pair) for pair in self.silent]
        if "strftime_now" in self.template.source:
            found["date"] = datetime.date.today().isoformat()  # another day's is another preparation
        return found
