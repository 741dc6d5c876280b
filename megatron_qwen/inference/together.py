"""All ranks of a layout answer what rank 0 asks; data-parallel replicas of the model divide it."""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch.distributed as dist

from megatron_qwen.inference.engine import Engine
from megatron_qwen.inference.request import Answer, Request

# Rank 0 may be reading a data set, or waiting for a person: longer than a collective may take.
_PATIENCE = datetime.timedelta(days=7)


class Together:
    """Ranks that answer together. Every rank makes one; then rank 0 asks, and all others ``follow``.

    Args:
        engine: of this rank.
    """

    def __init__(self, engine: Engine) -> None:
        groups = engine.stage.groups
        self.engine = engine
        self._replica, self._replicas = int(groups.dp.rank()), int(groups.dp.size())
        self._leads = groups.tp.rank() == 0 and groups.pp.rank() == 0
        self._asked = 0

    @property
    def replicas(self) -> int:
        """Data-parallel replicas of the model."""
        return self._replicas

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
        self._tell(list(requests))
        return self._compute(requests)

    def follow(self) -> None:
        """Answers with rank 0 until it is done; every other rank."""
        while (requests := self._told()) is not None:
            self._compute(requests)

    def close(self) -> None:
        """Lets the other ranks go on; rank 0 only."""
        self._tell(None)

    def _compute(self, requests: Sequence[Request]) -> dict[int, Answer]:
        mine = divided(requests, self._replicas)[self._replica]
        found = {request.number: answer for request, answer in self.engine.answer(mine)}
        if dist.get_world_size() == 1:
            return found
        self._meet()
        parts: list[Mapping[int, Answer]] = [{}] * dist.get_world_size()
        dist.gather_object(found if self._leads else {}, parts if dist.get_rank() == 0 else None)
        return {number: answer for part in parts for number, answer in part.items()}

    def _tell(self, requests: list[Request] | None) -> None:
        if dist.get_world_size() > 1:
            self._asked += 1
            self._store().set(self._key(), "")
            dist.broadcast_object_list([requests], device=self.engine.stage.device)

    def _told(self) -> list[Request] | None:
        self._asked += 1
        self._store().wait([self._key()], _PATIENCE)
        heard: list[list[Request] | None] = [None]
        dist.broadcast_object_list(heard, device=self.engine.stage.device)
        return heard[0]

    def _meet(self) -> None:
        """Waits until every rank is done: replicas need not be, within the time of a collective."""
        store, key = self._store(), f"{self._key()}/done"
        if store.add(key, 1) == dist.get_world_size():
            store.set(f"{key}/all", "")
        store.wait([f"{key}/all"], _PATIENCE)

    def _key(self) -> str:
        return f"mq/asked/{self._asked}"

    def _store(self) -> Any:
        return dist.distributed_c10d._get_default_store()


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
