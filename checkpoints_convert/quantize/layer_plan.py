"""Which linears of a layer read the same inputs, in the order in which a layer computes them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from checkpoints_convert.quantize.hessian import hessian_bytes

# Last components of linears that read one input, first to last in a layer.
_STAGES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class InputGroup:
    """Linears of a layer that read the same inputs: one Hessian serves them.

    Args:
        linears: their names in the layer, ``mlp.experts.3.gate_proj``.
        columns: width of the inputs.
    """

    linears: tuple[str, ...]
    columns: int

    @property
    def watched(self) -> str:
        """The module whose inputs are taken."""
        return self.linears[0]


def stages(columns: Iterable[tuple[str, int]]) -> list[list[InputGroup]]:
    """The quantized linears of a layer by input, in the order of the layer: q k v; o; gate up; down.

    Args:
        columns: every linear's name in the layer, and the width of its inputs.
    """
    widths = dict(columns)
    found: list[list[InputGroup]] = []
    for kinds in _STAGES:
        modules = dict.fromkeys(name.rpartition(".")[0] for name in widths if name.rpartition(".")[2] in kinds)
        groups = []
        for module in modules:
            linears = tuple(name for kind in kinds if (name := f"{module}.{kind}") in widths)
            groups.append(InputGroup(linears, widths[linears[0]]))
        found.append(groups)
    assert sum(len(group.linears) for groups in found for group in groups) == len(widths), sorted(widths)
    return found


def turns(groups: Sequence[InputGroup], *, budget: int) -> list[list[InputGroup]]:
    """Groups whose Hessians are in memory together.

    Args:
        groups: of a stage; an MoE layer has one for every expert.
        budget: bytes for the Hessians. A single one may be larger: it has a turn of its own.
    """
    found: list[list[InputGroup]] = []
    free = 0
    for group in groups:
        size = hessian_bytes(group.columns)
        if size > free or not found:
            found.append([])
            free = budget
        found[-1].append(group)
        free -= size
    return found
