"""``mq convert inspect`` of a Hugging Face directory: tensors, parts, bits a weight, and how it is quantized.

Headers are read, and of quantized weights scales, zeros and indices; not the weights themselves.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints_convert.dequantize.directory_format import Scheme
from checkpoints_convert.dequantize.quantized_directory import QuantizedDirectory, states_quantization
from checkpoints_convert.hf_directory import HfDirectory

# By what a tensor's name holds, the part of the model it belongs to; the first that fits.
_PARTS = (
    ("embed_tokens", "embedding"),
    ("lm_head", "output matrix"),
    ("norm", "norms"),
    ("self_attn", "attention"),
    (".experts.", "routed experts"),
    ("shared_expert", "shared expert"),
    ("mlp.gate.", "router"),
    (".mlp.", "feed-forward"),
)


@dataclass(frozen=True)
class StoredRow:
    """A tensor, or a part of the model.

    Args:
        name: of it.
        shape: of a tensor; empty for a part.
        format: dtype, or the precision of a quantized weight.
        values: weights.
        size: bytes in the files, of a quantized weight with its scales, zeros and indices.
        quantized: whether it is a quantized weight.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    values: int
    size: int
    quantized: bool = False

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.size / max(1, self.values)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "bits_per_weight": self.bits}


@dataclass(frozen=True)
class DirectoryInspection:
    """What is in a directory.

    Args:
        path: of it.
        model_type: of config.json.
        scheme: how weights are quantized; None where they are not.
        files: how many files hold the weights.
        tensors: every tensor of the model.
        parts: the tensors by part of the model.
        passed_over: what lies there and is not part of the model; for people.
    """

    path: Path
    model_type: str
    scheme: Scheme | None
    files: int
    tensors: list[StoredRow]
    parts: list[StoredRow]
    passed_over: list[str]

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        told = self.scheme
        return {
            "path": str(self.path),
            "model_type": self.model_type,
            "quantization": None if told is None else asdict(told),
            "files": self.files,
            "weights": self._all.values,
            "bytes": self._all.size,
            "bits_per_weight": self._all.bits,
            "quantized": None if told is None else self._quantized.as_json(),
            "parts": [row.as_json() for row in self.parts],
            "tensors": [row.as_json() for row in self.tensors],
            "passed_over": self.passed_over,
        }

    def __str__(self) -> str:
        head = [f"{self.path}", f"{self.model_type}, {self.files} files of weights"]
        everything, quantized = self._all, self._quantized
        last = [
            f"{everything.values:,} weights in {everything.size / 1e6:,.2f} MB: {everything.bits:.2f} bits a weight"
        ]
        if self.scheme is not None:
            inputs = f"; inputs of layers: {self.scheme.inputs}" if self.scheme.inputs else ""
            head.append(f"quantized: {self.scheme}{inputs}")
            share = quantized.values / max(1, everything.values)
            last.append(f"quantized: {quantized.values:,} weights ({share:.1%}): {quantized.bits:.2f} bits a weight")
        head += [f"not read: {one}" for one in self.passed_over]
        return "\n".join([*head, "", *_table(self.tensors, "tensor"), "", *_table(self.parts, "part"), *last])

    @property
    def _all(self) -> StoredRow:
        return _sum("all", self.tensors)

    @property
    def _quantized(self) -> StoredRow:
        return _sum("quantized", [row for row in self.tensors if row.quantized])


def inspect_directory(path: Path) -> DirectoryInspection:
    """Reads a directory's headers and configuration, quantized or not.

    Raises:
        ConversionError: with everything that is wrong with it.
    """
    source: HfDirectory = QuantizedDirectory(path) if states_quantization(path) else HfDirectory(path)
    quantized = source if isinstance(source, QuantizedDirectory) else None
    rows = []
    for name, info in source.tensors.items():
        values = torch.Size(info.shape).numel()
        if quantized is not None and name in quantized.weights:
            rows.append(
                StoredRow(name, info.shape, quantized.scheme.precision, values, quantized.stored_bytes(name), True)
            )
        else:
            dtype = str(info.dtype).removeprefix("torch.")
            rows.append(StoredRow(name, info.shape, dtype, values, values * info.dtype.itemsize))
    assert source.config is not None
    return DirectoryInspection(
        path,
        str(source.config["model_type"]),
        None if quantized is None else quantized.scheme,
        len(source.files()),
        rows,
        _by_part(rows),
        source.passed_over,
    )


def _by_part(rows: Iterable[StoredRow]) -> list[StoredRow]:
    parts: dict[str, list[StoredRow]] = {}
    for row in rows:
        name = next((part for mark, part in _PARTS if mark in row.name), "other")
        parts.setdefault(name, []).append(row)
    return [_sum(name, parts[name]) for name in (*(part for _, part in _PARTS), "other") if name in parts]


def _sum(name: str, rows: list[StoredRow]) -> StoredRow:
    formats = ", ".join(sorted({row.format for row in rows}))
    return StoredRow(name, (), formats, sum(row.values for row in rows), sum(row.size for row in rows))


def _table(rows: list[StoredRow], title: str) -> list[str]:
    width = max(len(title), *(len(row.name) for row in rows)) if rows else len(title)
    lines = [f"{title:<{width}}  {'shape':<20}{'format':<18}{'values':>18}{'MB':>14}{'bits':>8}"]
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        lines.append(
            f"{row.name:<{width}}  {shape:<20}{row.format:<18}{row.values:>18,}{row.size / 1e6:>14,.2f}{row.bits:>8.2f}"
        )
    return lines
