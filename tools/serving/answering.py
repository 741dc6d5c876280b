"""Answers to one HTTP request: choices that the service computes, as events in asyncio's loop."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from megatron_qwen.errors import UserError
from megatron_qwen.inference.request import Answer, Sampling
from megatron_qwen.inference.service import Service
from tools.generation.text_stream import TextStream


@dataclass(frozen=True)
class Event:
    """Something that happened to a choice.

    Args:
        choice: its number.
        text: that can be shown now.
        tokens: new ones, with their log-probabilities.
        answer: the whole answer, in its last event.
    """

    choice: int
    text: str = ""
    tokens: Sequence[tuple[int, float]] = ()
    answer: Answer | None = None


class TooLong(Exception):
    """The service did not answer in time."""


@dataclass
class _Choice:
    """One choice, as a listener of the service; its thread hands everything to asyncio's loop.

    Args:
        number: of the choice.
        put: takes what happened.
    """

    number: int
    put: Callable[[int, object], None]

    def token(self, token: int, logprob: float) -> None:
        """A token was chosen."""
        self.put(self.number, (token, logprob))

    def finished(self, answer: Answer) -> None:
        """The answer is whole."""
        self.put(self.number, answer)

    def failed(self, error: UserError) -> None:
        """It cannot be answered."""
        self.put(self.number, error)


@dataclass
class Answering:
    """The choices of one HTTP request; use it as an asynchronous context, which cancels what nobody waits for.

    Args:
        service: that answers.
        prompts: ids of each.
        sampling: how, with ``samples`` choices of each prompt.
        decode: ids to text.
        timeout_s: for all of it.
    """

    service: Service
    prompts: Sequence[tuple[int, ...]]
    sampling: Sampling
    decode: Callable[[Sequence[int]], str]
    timeout_s: float
    _numbers: list[int] = field(default_factory=list)

    async def __aenter__(self) -> "Answering":
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, object]]()

        def _put(choice: int, event: object) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (choice, event))

        self._deadline = loop.time() + self.timeout_s
        for at, prompt in enumerate(self.prompts):
            for sample in range(self.sampling.samples):
                listener = _Choice(at * self.sampling.samples + sample, _put)
                self._numbers.append(self.service.submit(prompt, self.sampling, listener, sample=sample))
        return self

    async def __aexit__(self, *_: object) -> None:
        for number in self._numbers:
            self.service.cancel(number)

    async def events(self) -> AsyncIterator[Event]:
        """What happens, until every choice has its answer.

        Raises:
            UserError: a prompt cannot be answered.
            TooLong: the time is over.
        """
        streams = [TextStream(self.decode, self.sampling.stop_strings) for _ in self._numbers]
        left = len(streams)
        while left:
            remaining = self._deadline - asyncio.get_running_loop().time()
            try:
                choice, event = await asyncio.wait_for(self._events.get(), max(0.0, remaining))
            except TimeoutError:
                raise TooLong from None
            if isinstance(event, UserError):
                raise event
            if isinstance(event, Answer):
                left -= 1
                yield Event(choice, streams[choice].end(), (), event)
            elif isinstance(event, tuple):
                token, logprob = event
                yield Event(choice, streams[choice].add(token), [(token, logprob)])
