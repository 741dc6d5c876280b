"""Answers requests that come and go while others are answered: a loop on all ranks, which rank 0 tells what is new."""

import itertools
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch.distributed as dist

from megatron_qwen.errors import Problem, UserError
from megatron_qwen.inference.engine import Engine
from megatron_qwen.inference.request import Answer, Request, Sampling

# Without work rank 0 tells the others so now and then: a collective waits for a limited time only.
_IDLE_S = 5.0


class Listener(Protocol):
    """Who asked, called by the thread of the loop."""

    def token(self, token: int, logprob: float) -> None:
        """A token was chosen."""

    def finished(self, answer: Answer) -> None:
        """The answer is whole."""

    def failed(self, error: UserError) -> None:
        """It cannot be answered."""


@dataclass
class _News:
    """What rank 0 tells in a tick.

    Args:
        requests: to be answered.
        cancelled: numbers of requests that nobody waits for any more.
        stop: whether to end when all is answered.
    """

    requests: list[Request] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    stop: bool = False


class Service:
    """Requests of many askers, on rank 0; every other rank only runs ``loop``.

    Under expert parallelism every data-parallel replica computes every answer, and that of rank 0 is given.

    Args:
        engine: of this rank.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inbox: queue.SimpleQueue[Callable[[_News], None]] = queue.SimpleQueue()
        self._numbers, self._listeners = itertools.count(), dict[int, Listener]()
        self._stopping = self._has_ended = False
        self.answered = 0
        self.tokens = 0

    @property
    def pending(self) -> int:
        """Requests that have no answer yet."""
        return len(self._listeners)

    @property
    def is_stopping(self) -> bool:
        """Whether no more requests are taken."""
        return self._stopping

    def submit(self, prompt: tuple[int, ...], sampling: Sampling, listener: Listener, *, sample: int = 0) -> int:
        """Asks; from any thread of rank 0.

        Returns:
            The number by which it can be cancelled.
        """
        number = next(self._numbers)
        self._listeners[number] = listener
        if self._has_ended and self._listeners.pop(number, None) is not None:
            listener.failed(_ended())
        self._inbox.put(lambda news: news.requests.append(Request(prompt, sampling, number, sample)))
        return number

    def cancel(self, number: int) -> None:
        """Gives up an answer; from any thread of rank 0. Its listener is not called again."""
        if self._listeners.pop(number, None) is not None:
            self._inbox.put(lambda news: news.cancelled.append(number))

    def stop(self) -> None:
        """Has the loop end when all is answered; from any thread of rank 0, or a signal handler."""
        self._stopping = True  # no lock: a signal handler may interrupt another
        self._inbox.put(lambda news: None)

    def loop(self) -> None:
        """Answers until ``stop``; on every rank, in one thread."""
        self.engine.on_token = self._token
        while True:
            news = self._exchange()
            for request in news.requests:
                self._begin(request)
            for number in news.cancelled:  # one that came in the same tick, too
                self.engine.cancel(number)
            # Replicas of a model with other experts may end an answer a tick apart where their bits differ.
            if self.engine.anybody(self.engine.is_busy):
                for request, answer in self.engine.step():
                    self._finish(request.number, answer)
            elif news.stop:
                break
        self._has_ended = True
        for number in list(self._listeners):  # asked between the last look and now
            if (listener := self._listeners.pop(number, None)) is not None:
                listener.failed(_ended())

    def _exchange(self) -> _News:
        """What is new, on every rank."""
        told = [self._collect() if dist.get_rank() == 0 else None]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(told, device=self.engine.stage.device)
        assert told[0] is not None
        return told[0]

    def _collect(self) -> _News:
        news = _News()
        deadline = time.monotonic() + _IDLE_S
        while True:
            wait_s = 0.0 if self.engine.is_busy or news.requests or self.is_stopping else deadline - time.monotonic()
            try:
                self._inbox.get(block=wait_s > 0, timeout=max(wait_s, 0.001))(news)
            except queue.Empty:
                break
        news.stop = self.is_stopping
        return news

    def _begin(self, request: Request) -> None:
        try:
            self.engine.add(request)
        except UserError as error:
            listener = self._listeners.pop(request.number, None)
            if listener is not None:
                listener.failed(error)

    def _token(self, request: Request, token: int, logprob: float) -> None:
        self.tokens += 1
        listener = self._listeners.get(request.number)
        if listener is not None:
            listener.token(token, logprob)

    def _finish(self, number: int, answer: Answer) -> None:
        self.answered += 1
        listener = self._listeners.pop(number, None)
        if listener is not None:
            listener.finished(answer)


def _ended() -> UserError:
    return UserError(Problem("request", None, "came when the server had ended."))
