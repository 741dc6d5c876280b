"""What rank 0 tells the other ranks, which may wait longer for it than a collective may take."""

import datetime
from typing import Any

import torch
import torch.distributed as dist

# Rank 0 may be reading a data set, or waiting for a person.
_PATIENCE = datetime.timedelta(days=7)


class Announcements:
    """Messages from rank 0, in their order. Every rank makes one.

    Args:
        name: tells these from others of the same process group.
        device: that collectives take.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._name, self._device, self._count, self._meetings = name, device, 0, 0

    def tell(self, what: Any) -> None:
        """Sends a message; rank 0 only."""
        if dist.get_world_size() > 1:
            self._count += 1
            _store().set(self._key, "")
            dist.broadcast_object_list([what], device=self._device)

    def told(self) -> Any:
        """Waits for the next message; every other rank."""
        self._count += 1
        _store().wait([self._key], _PATIENCE)
        heard = [None]
        dist.broadcast_object_list(heard, device=self._device)
        return heard[0]

    def meet(self) -> None:
        """Waits until every rank has come here."""
        if dist.get_world_size() == 1:
            return
        self._meetings += 1
        store, key = _store(), f"mq/{self._name}/met/{self._meetings}"
        if store.add(key, 1) == dist.get_world_size():
            store.set(f"{key}/all", "")
        store.wait([f"{key}/all"], _PATIENCE)

    @property
    def _key(self) -> str:
        return f"mq/{self._name}/{self._count}"


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
