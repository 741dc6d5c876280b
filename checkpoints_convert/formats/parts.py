"""Tensors of a quantized weight that are made when they are asked for.

What writes a file takes one tensor of a weight at a time, and scales cost less than codes.
"""

from collections.abc import Callable, Iterator, Mapping

import torch


class Parts(Mapping[str, torch.Tensor]):
    """Tensors by name, each made anew whenever it is asked for.

    Args:
        makers: what makes each of them.
    """

    def __init__(self, makers: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def also(self, makers: Mapping[str, Callable[[], torch.Tensor]]) -> "Parts":
        """These and others."""
        return Parts({**self._makers, **makers})
