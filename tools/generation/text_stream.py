"""Text of tokens as they come: only what no later token changes."""

from collections.abc import Callable, Sequence

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one answer.

    A token is decoded behind those of the piece before it, because a tokenizer may write the first token of a text in
    another way (SentencePiece leaves out its space). So an answer costs time by its length, not by its square.

    Args:
        decode: ids to text, control tokens left out.
        stops: texts that end it; they and what follows are left out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._before: list[int] = []  # the last piece of finished characters
        self._tokens: list[int] = []  # behind it
        self._text, self._sent, self._stopped = "", 0, False

    def add(self, token: int) -> str:
        """What can be shown after another token; empty while a character or a stop text may be incomplete."""
        self._tokens.append(token)
        piece = self._piece()
        if piece.endswith(_UNFINISHED):
            return ""
        self._take(piece)
        # One without text is no text before.
        self._before, self._tokens = self._tokens if piece else [*self._before, *self._tokens], []
        return self._shown(len(self._text) - self._held())

    def end(self) -> str:
        """What is left when no token follows."""
        self._take(self._piece() if self._tokens else "")
        self._tokens = []
        return self._shown(len(self._text))

    def _piece(self) -> str:
        return self._decode([*self._before, *self._tokens])[len(self._decode(self._before)) :]

    def _take(self, piece: str) -> None:
        """Adds text, up to a stop text."""
        if self._stopped:
            return
        first = max(0, len(self._text) - self._longest + 1)
        self._text += piece
        places = [at for stop in self._stops if (at := self._text.find(stop, first)) >= 0]
        if places:
            self._text, self._stopped = self._text[: min(places)], True

    def _held(self) -> int:
        """Characters at the end that may begin a stop text."""
        if self._stopped:
            return 0
        most = min(self._longest - 1, len(self._text) - self._sent)
        return next((size for size in range(most, 0, -1) if self._may_begin(self._text[-size:])), 0)

    def _may_begin(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)

    def _shown(self, upto: int) -> str:
        found, self._sent = self._text[self._sent : upto], max(self._sent, upto)
        return found
