"""A Hugging Face directory of quantized weights, read without trust under the names of the weights they stand for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoints_convert.dequantize.awq import AwqFormat
from checkpoints_convert.dequantize.compressed_tensors import CompressedTensorsFormat
from checkpoints_convert.dequantize.directory_format import DirectoryFormat, Part, QuantizedWeight, Scheme
from checkpoints_convert.dequantize.fp8 import BlockFp8Format
from checkpoints_convert.dequantize.gptq import GptqFormat
from checkpoints_convert.dequantize.settings import Settings
from checkpoints_convert.dequantize.stored import StoredTensors
from checkpoints_convert.formats.quantized_format import is_quantized
from checkpoints_convert.hf_directory import CONFIG, QUANTIZATION, HfDirectory, many, read_json
from checkpoints_convert.safetensors_format import StoredEntry
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.errors import ConversionError, Problem
from megatron_qwen.hf.mapping import hf_tensors

# The same parameters a second time, where AutoGPTQ and gptqmodel look for them.
QUANTIZE_CONFIG = "quantize_config.json"
_FORMATS: Mapping[str, Callable[[Settings], DirectoryFormat | None]] = {
    "gptq": GptqFormat.read,
    "awq": AwqFormat.read,
    "compressed-tensors": CompressedTensorsFormat.read,
    "fp8": BlockFp8Format.read,
}
_SHOWN = 20
_NOWHERE = -1


class QuantizedDirectory(HfDirectory):
    """A model whose linear layers are quantized; ``tensors`` and ``rows`` have them dequantized, as float32.

    Args:
        path: the directory; config.json has ``quantization_config``.

    Attributes:
        format: how they are quantized.
        weights: every quantized weight by its name.
        stored: the tensors of the files, under their own names.

    Raises:
        ConversionError: with everything that is wrong with it, scales and indices included.
    """

    def __init__(self, path: Path) -> None:
        self.weights: dict[str, QuantizedWeight] = {}
        self._format: DirectoryFormat | None = None
        self._parts: dict[str, list[str]] = {}
        super().__init__(path)

    @property
    def format(self) -> DirectoryFormat:
        """How the weights are quantized."""
        assert self._format is not None
        return self._format

    @property
    def scheme(self) -> Scheme:
        """For people, and for the limits of a comparison."""
        return self.format.scheme

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor; of a quantized weight, dequantized to float32."""
        weight = self.weights.get(name)
        return super().rows(name, start, stop) if weight is None else weight.rows(start, stop).values()

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor in the files: of a quantized weight, its codes, scales, zeros and indices."""
        parts = self._parts.get(name, [name])
        return sum(self.stored.entries[part].size for part in parts)

    def _plain_config(self) -> dict[str, Any]:
        assert self.config is not None
        problems: list[Problem] = []
        where = f"{self.path / CONFIG}: {QUANTIZATION}"
        self._format = _read_format(self.config.get(QUANTIZATION), where, problems)
        beside = self.path / QUANTIZE_CONFIG
        if isinstance(self._format, GptqFormat) and beside.is_file() and not problems:
            told = read_json(beside, problems)
            again = None if told is None else GptqFormat.read(Settings(told, str(beside), problems))
            if again is not None and not problems and again.scheme != self._format.scheme:
                fix = f"says {again.scheme}; {CONFIG} says {self._format.scheme}. Programs differ in which they read."
                problems.append(Problem(str(beside), None, fix))
        if problems:
            raise ConversionError(problems)
        return {name: value for name, value in self.config.items() if name != QUANTIZATION}

    def _find_quantized(self, model: ModelConfig, problems: list[Problem]) -> None:
        self.stored = StoredTensors(dict(self._entries), dict(self._files))
        expected = {item.name: item.shape for item in hf_tensors(model)}
        modules: dict[str, dict[str, StoredEntry]] = {}
        for name, entry in self._entries.items():
            module, _, part = name.rpartition(".")
            modules.setdefault(module, {})[part] = entry
        missing: list[str] = []
        faults: list[Problem] = []
        for module, parts in modules.items():
            shape = expected.get(f"{module}.weight", ())
            if len(shape) == 2 and self.format.is_quantized(parts):
                self._take_weight(module, (shape[0], shape[1]), parts, missing, faults)
        if not self.weights and not missing and not faults:
            fix = f"says {self.format.scheme}, and no weight is stored so: config.json and the files do not match."
            faults.append(Problem(f"{self.path / CONFIG}: {QUANTIZATION}", None, fix))
        if missing:
            problems.append(many(self.path, sorted(missing), "tensors of quantized weights are missing"))
        problems += self._left_out(expected)
        problems += faults[:_SHOWN]
        if len(faults) > _SHOWN:
            fix = f"and {len(faults) - _SHOWN:,} more faults of quantized weights."
            problems.append(Problem(str(self.path), None, fix))

    def _take_weight(
        self,
        module: str,
        shape: tuple[int, int],
        present: Mapping[str, StoredEntry],
        missing: list[str],
        faults: list[Problem],
    ) -> None:
        """Puts one weight in the place of its parts."""
        name, wanted = f"{module}.weight", self.format.parts(shape)
        absent = [part for part, one in wanted.items() if part not in present and not one.optional]
        missing += [f"{module}.{part}" for part in absent]
        found = [(part, present[part]) for part in wanted if part in present]
        wrong = [
            Problem(str(self.stored.files[f"{module}.{part}"]), f"{module}.{part}", fault)
            for part, entry in found
            if (fault := self._part_fault(entry, wanted[part])) is not None
        ]
        if (fault := self.format.shape_fault(shape)) is not None:
            wrong = [Problem(str(self.path), name, fault)]
        if not wrong and not absent:
            weight = self.format.open(self.stored, module, shape)
            wrong = [Problem(str(self.stored.files[part]), part, fault) for part, fault in weight.faults()]
            self.weights[name] = weight
        faults += wrong
        file = self.stored.files[f"{module}.{next(iter(present))}"]
        self._parts[name] = [f"{module}.{part}" for part, _ in found]
        for part in self._parts[name]:
            del self._entries[part], self._files[part]
        if name in self._entries:
            faults.append(Problem(str(self._files[name]), name, "is stored quantized and not quantized: remove one."))
        self._entries[name], self._files[name] = StoredEntry(name, torch.float32, shape, _NOWHERE), file

    def _part_fault(self, entry: StoredEntry, wanted: Part) -> str | None:
        if entry.shape not in wanted.shapes:
            told = " or ".join(str(list(shape)) for shape in wanted.shapes)
            return f"has the shape {list(entry.shape)} where config.json says {told} ({self.format.scheme})."
        if entry.dtype not in wanted.dtypes:
            told = " or ".join(str(dtype).removeprefix("torch.") for dtype in wanted.dtypes)
            return f"has the dtype {str(entry.dtype).removeprefix('torch.')}; {told} is what the format has."
        return None

    def _left_out(self, expected: Mapping[str, tuple[int, ...]]) -> list[Problem]:
        """Where config.json and the files differ in which layers are quantized: a program would not load them."""
        where, found = self.path / CONFIG, []
        plain, packed = [], []
        for name in expected:
            left_out = self.format.left_out.holds(name.removesuffix(".weight"))
            if name in self._parts and left_out is True:
                packed.append(name)
            elif is_quantized(name) and name in self._entries and name not in self._parts and left_out is False:
                plain.append(name)
        if packed:
            found.append(many(where, packed, "weights are quantized, and quantization_config leaves them out"))
        if plain:
            found.append(
                many(where, plain, "weights are not quantized, and quantization_config does not leave them out")
            )
        return found


def states_quantization(path: Path) -> bool:
    """Whether the config.json of a directory says that weights are quantized; False where it cannot be read."""
    content = read_json(path / CONFIG, [])
    return content is not None and content.get(QUANTIZATION) is not None


def _read_format(told: Any, where: str, problems: list[Problem]) -> DirectoryFormat | None:
    """The format that ``quantization_config`` names; None, and problems, where it names none that is known."""
    if not isinstance(told, dict):
        problems.append(Problem(where, told, "must be a JSON object."))
        return None
    settings = Settings(told, where, problems)
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in _FORMATS:
        settings.wrong("quant_method", method, f"is not supported; supported: {', '.join(_FORMATS)}.")
        return None
    return _FORMATS[method](settings)
