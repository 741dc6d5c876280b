"""Which modules a ``quantization_config`` leaves out: names, and the regular expressions that programs write there."""

import re
from collections.abc import Iterable

# What is taken as a regular expression: letters, escaped dots, ".", ".*", "\d+" and "[0-9]+", anchors. Nothing that is
# repeated can repeat inside itself, so that a crafted pattern cannot take hours.
_SAFE = re.compile(r"(?:[A-Za-z0-9_^$-]|\\[.dw][*+]?|\[0-9\][*+]?|\.[*+]?)*")
_LONGEST, _MOST_REPEATS = 200, 3


class ModuleNames:
    """Modules that are named in a list.

    Args:
        names: names, ends or beginnings of names.
        patterns: regular expressions that match from the beginning of a name.
    """

    def __init__(self, names: Iterable[str], patterns: Iterable[str] = ()) -> None:
        self._names = sorted(set(names))
        self._exact = frozenset(self._names)
        self._patterns: list[re.Pattern[str]] = []
        self._all_understood = True
        for text in patterns:
            if len(text) > _LONGEST or _SAFE.fullmatch(text) is None or len(re.findall("[*+]", text)) > _MOST_REPEATS:
                self._all_understood = False
            else:
                self._patterns.append(re.compile(text))

    def holds(self, module: str) -> bool | None:
        """Whether a module is meant; None where programs differ in it.

        Programs compare a name as a whole, by components or as a substring (``mlp.gate`` is in ``mlp.gate_proj``).
        """
        if module in self._exact or any(pattern.match(module) for pattern in self._patterns):
            return True
        dotted = f".{module}."
        if any(f".{name}." in dotted for name in self._names if name):
            return True
        if not self._all_understood or any(name in module for name in self._names):
            return None
        return False
