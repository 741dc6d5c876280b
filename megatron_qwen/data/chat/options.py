"""How the conversations of a preparation become ids."""

import datetime
from dataclasses import dataclass
from typing import Any

from megatron_qwen.data.chat.template import ChatTemplate


@dataclass(frozen=True)
class ChatOptions:
    """How conversations become ids.

    Args:
        template: of the tokenizer.
        most_tokens: a longer conversation is left out, and counted; None leaves none out.
    """

    template: ChatTemplate
    most_tokens: int | None = None

    def identity(self) -> dict[str, Any]:
        """What decides the ids."""
        found = {**self.template.identity, "most_tokens": self.most_tokens}
        if "strftime_now" in self.template.source:
            found["date"] = datetime.date.today().isoformat()  # another day's is another preparation
        return found
