"""The importance matrix of a release's GGUF files, measured when the files are about to be written."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from checkpoints_convert.formats.gguf.names import GgufTensor, gguf_tensors
from checkpoints_convert.formats.quantized_format import is_quantized
from checkpoints_convert.model_source import ModelSource
from checkpoints_convert.quantize.calibration_request import CalibrationRequest, calibration_folder, calibration_model
from checkpoints_convert.quantize.importance import Importances, importance_identity, importances
from checkpoints_convert.quantize.padding import Padding
from checkpoints_convert.release import identity_digest
from megatron_qwen.errors import Problem


class ImportanceMatrix:
    """Mean squares of the inputs of every quantized weight, by the name of its tensor in a GGUF file.

    Args:
        source: what is quantized.
        padding: of the release.
        out: the release; what is done is kept beside it until ``discard``.
        request: on which data.

    Raises:
        DataError: files cannot be read, or hold too few tokens.
    """

    def __init__(self, source: ModelSource, *, padding: Padding, out: Path, request: CalibrationRequest) -> None:
        self._model = calibration_model(source, padding)
        self._work = calibration_folder(out)
        self._options = replace(request.options, restart=request.restart)
        self._samples = request.samples(source)
        tensors = gguf_tensors(padding.model(source.model))
        self._sources = {
            tensor.name: tensor.sources for tensor in tensors if all(is_quantized(name) for name in tensor.sources)
        }
        self._read: dict[str, torch.Tensor] = {}  # a tensor is encoded in many blocks of rows

    @cached_property
    def digest(self) -> str:
        """Of everything that determines the values."""
        return identity_digest(importance_identity(self._model, self._options, self._samples))

    def problems(self, tensors: Mapping[str, GgufTensor]) -> list[Problem]:
        """None: names and shapes follow from the model, and ``SolvedStore`` keeps finite values only."""
        return []

    def prepare(self) -> None:
        """Measures what an earlier attempt has not measured."""
        _ = self._found

    def has(self, name: str) -> bool:
        """Whether a tensor of a file is a quantized weight."""
        return name in self._sources

    def columns(self, name: str, part: int) -> torch.Tensor:
        """Of the columns of a tensor of a file, float32 [columns]; of the expert ``part`` where it holds several."""
        source = self._sources[name][part]
        if source not in self._read:
            self._read[source] = self._found.column(source).contiguous()
        return self._read[source]

    def discard(self) -> None:
        """Removes what was kept beside the release."""
        shutil.rmtree(self._work, ignore_errors=True)

    @cached_property
    def _found(self) -> Importances:
        return importances(self._model, samples=self._samples, options=self._options, work=self._work)
