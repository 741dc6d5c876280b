"""Text of tokens as they come: only what no later token changes."""

from collections.abc import Callable, Sequence

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one answer.

    Args:
        decode: ids to text, control tokens left out.
        stops: texts that end it; they and what follows are left out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, tuple(stops)
        self._tokens: list[int] = []
        self._sent = ""

    def add(self, token: int) -> str:
        """What can be shown after another token; empty while a character or a stop text may be incomplete."""
        self._tokens.append(token)
        text = self._cut(self._decode(self._tokens)).rstrip(_UNFINISHED)
        return self._new(text[: len(text) - self._held(text)])

    def end(self) -> str:
        """What is left when no token follows."""
        return self._new(self._cut(self._decode(self._tokens)))

    def _cut(self, text: str) -> str:
        places = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        return text[: min(places)] if places else text

    def _held(self, text: str) -> int:
        """Characters at the end that may begin a stop text."""
        longest = max(map(len, self._stops), default=1) - 1
        return next((size for size in range(min(longest, len(text)), 0, -1) if self._may_begin(text[-size:])), 0)

    def _may_begin(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)

    def _new(self, text: str) -> str:
        # A tokenizer that changes what it has given (a space at the beginning) gives nothing until it is longer.
        if len(text) <= len(self._sent) or not text.startswith(self._sent):
            return ""
        found, self._sent = text[len(self._sent) :], text
        return found
