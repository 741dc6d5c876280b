"""Solved layers on the disk, one file each, so that a calibration that was killed keeps what it has done.

``layer-00007.safetensors`` holds of every linear ``NAME.codes`` (``NAME.codes4``: two 4-bit codes in a byte, the lower
bits first), ``NAME.scales``, ``NAME.zeros`` and, with act-order, ``NAME.group_of``; of tensors that got other values
``NAME.changed``. The file and then its hash (``layer-00007.xxh3``) appear by renaming: a layer is done when its hash is
there and agrees. ``identity.json`` has everything that determines the bytes.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
import xxhash

from checkpoints_convert.formats.quantized_linear import QuantizedLinear
from checkpoints_convert.quantize.layer_solution import LayerSolution
from megatron_qwen.errors import ConversionError, Problem
from megatron_qwen.files import atomic_path, atomic_write, atomic_write_json

_IDENTITY = "identity.json"
_BLOCK = 1 << 24


class SolvedStore:
    """The solved layers of a model. Made by ``open``.

    Args:
        directory: of the files.
        layers: layers of the model.
    """

    def __init__(self, directory: Path, *, layers: int) -> None:
        self.directory, self.layers = directory, layers

    @classmethod
    def open(cls, directory: Path, identity: Mapping[str, Any], *, layers: int, restart: bool = False) -> Self:
        """Opens a store, or begins one.

        Args:
            directory: of the files.
            identity: everything that determines them: source, method, options, calibration data.
            layers: layers of the model.
            restart: discard the layers of another calibration.

        Raises:
            ConversionError: there are layers of another calibration; says in what it differs.
        """
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / _IDENTITY
        wanted = json.loads(json.dumps(identity))
        found = _noted(path)
        if found is not None and found != wanted and not restart:
            before, now = _flat(found), _flat(wanted)
            differs = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            told = "; ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in differs[:5])
            fix = f"has layers of another calibration ({told}); give --restart to discard them, or another directory."
            raise ConversionError(Problem(str(directory), None, fix))
        if found != wanted:
            # Of layers without an identity nobody knows what they are: what deleted it did not come to them.
            for left in directory.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            atomic_write_json(path, wanted, durable=True)
        return cls(directory, layers=layers)

    def completed(self) -> int:
        """Layers that are done, from the first on; those behind a damaged one do not count."""
        done = 0
        while done < self.layers and self._is_done(done):
            done += 1
        return done

    def commit(self, layer: int, solution: LayerSolution) -> None:
        """Writes a layer; it is on the disk when this returns.

        Raises:
            ConversionError: scales or altered tensors are not finite, because weights are not.
        """
        from safetensors.torch import save_file

        made = solution.changed | {name: linear.scales for name, linear in solution.linears.items()}
        if broken := [name for name, values in made.items() if not bool(values.isfinite().all())]:
            fix = "has values that are not finite, or gives such: the weights are damaged."
            raise ConversionError([Problem(f"model.layers.{layer}.{name}", None, fix) for name in sorted(broken)])
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}{name}.changed": value.cpu().contiguous() for name, value in solution.changed.items()}
        for name, linear in solution.linears.items():
            tensors |= {f"{prefix}{name}.{part}": value for part, value in _stored(linear).items()}
        path = self._path(layer)
        with atomic_path(path, durable=True) as temporary:
            save_file(tensors, temporary)
            digest = _digest(temporary)
        atomic_write(path.with_suffix(".xxh3"), digest, durable=True)

    def linears(self, layer: int) -> list[str]:
        """Names of the linears of a layer, sorted."""
        from safetensors import safe_open

        with safe_open(self._path(layer), framework="pt") as file:
            return sorted(key.removesuffix(".scales") for key in file.keys() if key.endswith(".scales"))  # noqa: SIM118

    def linear(self, name: str) -> QuantizedLinear:
        """A linear by the Hugging Face name of its weight (``model.layers.0.mlp.up_proj.weight``)."""
        found = self._read(name, ("codes", "codes4", "scales", "zeros", "group_of"))
        codes = found["codes"] if "codes" in found else _unpacked(found["codes4"])
        return QuantizedLinear(codes, found["scales"], found["zeros"], found.get("group_of"))

    def changed(self, name: str) -> torch.Tensor | None:
        """Another value of a tensor that is not quantized, in the source's format; None if it stays as it is."""
        if not name.startswith("model.layers."):
            return None
        return self._read(name, ("changed",)).get("changed")

    def _read(self, name: str, parts: tuple[str, ...]) -> dict[str, torch.Tensor]:
        from safetensors import safe_open

        with safe_open(self._path(int(name.split(".")[2])), framework="pt") as file:
            there = set(file.keys())
            return {part: file.get_tensor(key) for part in parts if (key := f"{name}.{part}") in there}

    def _path(self, layer: int) -> Path:
        return self.directory / f"layer-{layer:05d}.safetensors"

    def _is_done(self, layer: int) -> bool:
        path = self._path(layer)
        try:
            return path.with_suffix(".xxh3").read_text() == _digest(path)
        except OSError:
            return False


def _noted(path: Path) -> dict[str, Any] | None:
    """The identity of a store; None where there is none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _stored(linear: QuantizedLinear) -> dict[str, torch.Tensor]:
    codes = linear.codes.cpu()
    found = {"scales": linear.scales.cpu().contiguous(), "zeros": linear.zeros.cpu().contiguous()}
    if int(codes.max()) < 16 and codes.shape[1] % 2 == 0:
        found["codes4"] = codes[:, ::2] | codes[:, 1::2] << 4
    else:
        found["codes"] = codes.contiguous()
    if linear.group_of is not None:
        found["group_of"] = linear.group_of.cpu().contiguous()
    return found


def _unpacked(pairs: torch.Tensor) -> torch.Tensor:
    return torch.stack((pairs & 15, pairs >> 4), dim=2).flatten(1)


def _digest(path: Path) -> str:
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
