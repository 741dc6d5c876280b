"""GPTQ's layout: words along the input dimension, a group for every column of the weight.

A weight of [out, in] is qweight int32 [in x bits / 32, out] (low bits first), scales [groups, out], qzeros int32
[groups, out x bits / 32] and g_idx int32 [in]. A value is (code - zero) x scale. checkpoint_format ``gptq`` stores
zero - 1, ``gptq_v2`` stores zero. Source: AutoGPTQ's and gptqmodel's linear layers; a zero read by the other
convention is off by one, which vllm's issue 26343 shows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from checkpoints_convert.dequantize.directory_format import SCALE_DTYPES, Part, Scheme
from checkpoints_convert.dequantize.module_names import ModuleNames
from checkpoints_convert.dequantize.packing import WORD, unpack
from checkpoints_convert.dequantize.quantized_rows import IntegerRows
from checkpoints_convert.dequantize.settings import Settings
from checkpoints_convert.dequantize.stored import StoredTensors
from checkpoints_convert.dequantize.values import index_fault, row_blocks, scale_fault
from checkpoints_convert.safetensors_format import StoredEntry

_VERSIONS = ("gptq", "gptq_v2")
_MARKS = ("qweight", "qzeros", "scales", "g_idx")
# A rule of gptqmodel's "dynamic" that leaves modules out; any other gives some of them other parameters.
_LEAVES_OUT = "-:"
_LARGEST_GROUP = 1 << 20


@dataclass(frozen=True)
class GptqFormat:
    """GPTQ with the parameters of a config.json.

    Args:
        bits: of a code.
        group: columns that share a scale; None: all of a row.
        act_order: whether columns may have any group.
        symmetric: whether zero is the middle code everywhere.
        stored_minus: what is subtracted from a zero before it is stored.
        left_out: modules that stay as they are.
    """

    bits: int
    group: int | None
    act_order: bool
    symmetric: bool
    stored_minus: int
    left_out: ModuleNames

    @classmethod
    def read(cls, settings: Settings) -> "GptqFormat":
        """From ``quantization_config`` or quantize_config.json; problems go to the settings."""
        group = settings.whole("group_size", low=1, high=_LARGEST_GROUP, also=(-1,))
        version = "checkpoint_format" if settings.get("checkpoint_format") is not None else "format"
        rules = settings.section("dynamic", required=False)
        patterns: list[str] = []
        if rules is not None:
            told = settings.get("dynamic")
            patterns = [rule.removeprefix(_LEAVES_OUT) for rule in told if rule.startswith(_LEAVES_OUT)]
            if len(patterns) < len(told):
                others = next(rule for rule in told if not rule.startswith(_LEAVES_OUT))
                settings.wrong("dynamic", others, "gives modules parameters of their own, which is not supported.")
        return cls(
            bits=settings.choice("bits", (4, 8)),
            group=None if group == -1 else group,
            act_order=settings.choice("desc_act", (False, True), default=False),
            symmetric=settings.choice("sym", (True, False)),
            stored_minus=1 if settings.choice(version, _VERSIONS, default=_VERSIONS[0]) == _VERSIONS[0] else 0,
            left_out=ModuleNames((), patterns),
        )

    @property
    def scheme(self) -> Scheme:
        """For people, and for the limits of a comparison."""
        told = {
            "group": self.group or "a whole row",
            "act-order": self.act_order,
            "symmetric": self.symmetric,
            "zeros": f"of {_VERSIONS[1 - self.stored_minus]}",
        }
        return Scheme("gptq", f"int{self.bits}", told)

    @property
    def per_word(self) -> int:
        """Codes of a word."""
        return WORD // self.bits

    def groups(self, columns: int) -> int:
        """Scales of a row."""
        return 1 if self.group is None else -(-columns // self.group)

    def is_quantized(self, parts: Mapping[str, StoredEntry]) -> bool:
        """Whether any of the tensors is there."""
        return any(mark in parts for mark in _MARKS)

    def shape_fault(self, shape: tuple[int, int]) -> str | None:
        """Both dimensions are packed into words."""
        if any(length % self.per_word for length in shape):
            return f"has the shape {list(shape)}; GPTQ packs {self.per_word} codes a word along both dimensions."
        return None

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """The four tensors."""
        (rows, columns), groups = shape, self.groups(shape[1])
        return {
            "qweight": Part(((columns // self.per_word, rows),), (torch.int32,)),
            "qzeros": Part(((groups, rows // self.per_word),), (torch.int32,)),
            "scales": Part(((groups, rows),), SCALE_DTYPES),
            "g_idx": Part(((columns,),), (torch.int32,)),
        }

    def open(self, stored: StoredTensors, module: str, shape: tuple[int, int]) -> "GptqWeight":
        """A weight whose parts were found right."""
        return GptqWeight(self, stored, module, shape)


@dataclass(frozen=True)
class GptqWeight:
    """A weight in GPTQ's layout."""

    format: GptqFormat
    stored: StoredTensors
    module: str
    shape: tuple[int, int]

    def rows(self, start: int, stop: int) -> IntegerRows:
        """Rows: columns of what is stored, read word by word."""
        bits, per_word = self.format.bits, self.format.per_word
        codes = unpack(self.stored.columns(f"{self.module}.qweight", start, stop), bits, dim=0)
        scales = self.stored.columns(f"{self.module}.scales", start, stop).float()
        first = start // per_word
        zeros = unpack(self.stored.columns(f"{self.module}.qzeros", first, -(-stop // per_word)), bits, dim=1)
        zeros = zeros[:, start - first * per_word :][:, : stop - start].float() + self.format.stored_minus
        group_of = self.stored.whole(f"{self.module}.g_idx").long()
        return IntegerRows(codes.t(), scales.t()[:, group_of], zeros.t()[:, group_of], 0, (1 << bits) - 1)

    def faults(self) -> Iterator[tuple[str, str]]:
        """Scales, indices, and zeros where config.json says what they are."""
        scales, zeros, index = (f"{self.module}.{part}" for part in ("scales", "qzeros", "g_idx"))
        if fault := scale_fault(self.stored, scales):
            yield scales, fault
        groups = self.format.groups(self.shape[1])
        if fault := index_fault(self.stored, index, groups=groups):
            yield index, fault
        elif not self.format.act_order and not self._consecutive(index):
            yield (
                index,
                (
                    "has groups that are not consecutive, and desc_act is false, by which programs pass over g_idx: "
                    "they would compute another model. Set desc_act to true if the order is meant."
                ),
            )
        if self.format.symmetric and (fault := self._other_zeros(zeros)):
            yield zeros, fault

    def _consecutive(self, index: str) -> bool:
        columns = self.shape[1]
        wanted = torch.arange(columns) // (self.format.group or columns)
        return torch.equal(self.stored.whole(index).long(), wanted)

    def _other_zeros(self, name: str) -> str | None:
        """Programs pass over the zeros where ``sym`` is true, so they must be the middle code."""
        middle, minus = 1 << (self.format.bits - 1), self.format.stored_minus
        for _, block in row_blocks(self.stored, name):
            found = unpack(block, self.format.bits, dim=1)
            if (found == middle - minus).all():
                continue
            for version, other in zip(_VERSIONS, (1, 0), strict=True):
                if (found == middle - other).all():
                    return (
                        f"holds {middle - other}, the middle code as {version} stores it; checkpoint_format is "
                        f"{_VERSIONS[1 - minus]}, by which every zero is off by one. Set it to {version}."
                    )
            value = int(found[found != middle - minus][0])
            return f"holds the zero {value + minus}; sym is true, by which all must be {middle}."
        return None
