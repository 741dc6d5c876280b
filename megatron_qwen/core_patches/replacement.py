"""How a patch wraps a function: once, with a mark on the wrapper that names what it wraps."""

from collections.abc import Callable
from typing import Any

_MARK = "_replaces"


def wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Puts ``make(present)`` in the place of a function, unless a wrapper of ours is there already.

    Args:
        owner: the module or class.
        name: of the function in it.
        make: what makes the wrapper of the function it is handed.
    """
    if is_wrapped(owner, name):
        return
    present = getattr(owner, name)
    wrapper = make(present)
    setattr(wrapper, _MARK, present)
    setattr(owner, name, wrapper)


def is_wrapped(owner: Any, name: str) -> bool:
    """Whether a function has been replaced by ``wrap``."""
    return hasattr(getattr(owner, name), _MARK)
