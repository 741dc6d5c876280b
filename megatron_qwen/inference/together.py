"""All ranks of a layout answer what rank 0 asks; data-parallel replicas of the model divide it."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import torch.distributed as dist

from megatron_qwen.inference.announcements import Announcements
from megatron_qwen.inference.engine import Engine
from megatron_qwen.inference.request import Answer, Request

_AT_A_TIME = 512  # requests of a replica between two writes of what is answered


class Together:
    """Ranks that answer together. Every rank makes one; then rank 0 asks, and all others ``follow``.

    Args:
        engine: of this rank.
        meeting: where ranks wait for one another, where several of these are made in a process; None makes one.
    """

    def __init__(self, engine: Engine, meeting: Announcements | None = None) -> None:
        groups = engine.stage.groups
        self.engine = engine
        self._replica, self._replicas = int(groups.dp.rank()), int(groups.dp.size())
        self._leads = groups.tp.rank() == 0 and groups.pp.rank() == 0
        self._asked = Announcements("asked", engine.stage.device)
        self._meeting = meeting or self._asked

    @property
    def longest(self) -> int:
        """Positions of a text."""
        return self.engine.stage.longest

    @property
    def at_a_time(self) -> int:
        """Requests that are worth an ``answer``: so many are lost where a process is killed."""
        return _AT_A_TIME * self._replicas

    def answer(self, requests: Sequence[Request]) -> dict[int, Answer]:
        """Answers by the number of the request; rank 0 only.

        Raises:
            ValueError: two requests have the same number.
            DataError: a request cannot be answered (``Engine.problem``); no rank has begun then.
        """
        if len({request.number for request in requests}) < len(requests):
            raise ValueError("requests need numbers of their own")
        if not requests:
            return {}
        self.engine.require(requests)
        self._asked.tell(list(requests))
        return self.compute(requests)

    def follow(self) -> None:
        """Answers with rank 0 until it is done; every other rank."""
        while (requests := self._asked.told()) is not None:
            self.compute(requests)

    def close(self) -> None:
        """Lets the other ranks go on; rank 0 only."""
        self._asked.tell(None)

    def compute(self, requests: Sequence[Request]) -> dict[int, Answer]:
        """Answers on rank 0, nothing elsewhere; every rank calls it with the same requests."""
        mine = divided(requests, self._replicas)[self._replica]
        found = {request.number: answer for request, answer in self.engine.answer(mine)}
        if dist.get_world_size() == 1:
            return found
        self._meeting.meet()
        parts: list[Mapping[int, Answer]] = [{}] * dist.get_world_size()
        dist.gather_object(found if self._leads else {}, parts if dist.get_rank() == 0 else None)
        return {number: answer for part in parts for number, answer in part.items()}


def divided(requests: Sequence[Request], replicas: int) -> list[list[Request]]:
    """Parts of about as many tokens each, in the order of the prompts, so that equal beginnings are computed once."""
    ordered = sorted(requests, key=lambda request: (request.prompt, request.number))
    costs = list(accumulate(len(one.prompt) + (one.sampling.max_new_tokens if one.sampling else 0) for one in ordered))
    parts: list[list[Request]] = [[] for _ in range(replicas)]
    for request, upto in zip(ordered, costs, strict=True):
        parts[min(replicas - 1, (upto - 1) * replicas // costs[-1])].append(request)
    return parts


def in_parts(requests: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    """Requests in the order of their prompts, so many at a time, for a caller that keeps what is answered."""
    ordered = sorted(requests, key=lambda request: (request.prompt, request.number))
    for at in range(0, len(ordered), size):
        yield ordered[at : at + size]
