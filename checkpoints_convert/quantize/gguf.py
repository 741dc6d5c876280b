"""GGUF files of what is quantized: padded as in the other formats, with an importance matrix where asked for."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoints_convert.checkpoint_source import CheckpointSource
from checkpoints_convert.formats.gguf.writing import GgufOptions, require_gguf, write_gguf
from checkpoints_convert.model_source import ModelSource
from checkpoints_convert.quantize.calibration_request import CalibrationRequest
from checkpoints_convert.quantize.card import ReleaseFacts
from checkpoints_convert.quantize.importance_matrix import ImportanceMatrix
from checkpoints_convert.quantize.names import GGUF, IMPORTANCE, NEAREST, UNWEIGHED_KINDS
from checkpoints_convert.quantize.padding import PaddedWeights
from checkpoints_convert.quantize.plan import weights_in
from checkpoints_convert.quantize.run import Quantized, QuantizeOptions
from checkpoints_convert.tensor_set import TensorSet
from megatron_qwen.config.run import Architecture

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _PaddedSource:
    """A source in the shape that is written."""

    path: Path
    name: str
    architecture: Architecture
    stated: Mapping[str, Any]
    tensors: TensorSet
    tokenizer_dir: Path | None
    checkpoint: CheckpointSource | None
    digest: str


def require(source: ModelSource, out: Path, kinds: Sequence[str], options: QuantizeOptions) -> None:
    """Refuses what cannot be written, before anything is.

    Raises:
        ConversionError: a shape, the tokenizer or the architecture cannot be held.
    """
    require_gguf(_padded(source, options), out, kinds, GgufOptions(name=source.name, license_=options.license_))


def write(
    source: ModelSource,
    out: Path,
    kinds: Sequence[str],
    options: QuantizeOptions,
    *,
    importance: bool,
    request: CalibrationRequest,
) -> list[Quantized]:
    """Writes ``out`` with a file of every kind; it appears only when it is complete.

    Args:
        source: what is quantized.
        out: the directory to make.
        kinds: such as ``Q4_K_M``.
        options: whose padding, size of files, workers, licence, restart and quiet count.
        importance: whether the inputs of every weight are measured first, for kinds that can use it.
        request: on which data.

    Returns:
        One for each kind; what was done is that of all together.

    Raises:
        ConversionError: a shape, the tokenizer or the architecture cannot be held, or ``out`` is occupied.
        DataError: the data of the importance matrix cannot be read.
    """
    weighed = [kind for kind in kinds if kind not in UNWEIGHED_KINDS] if importance else []
    if importance and not weighed:
        log.warning("--importance: %s take no importances; it counts for nothing", ", ".join(kinds))
    matrix = ImportanceMatrix(source, padding=options.padding, out=out, request=request) if weighed else None
    how = GgufOptions(
        name=source.name,
        max_shard_bytes=options.max_shard_bytes,
        workers=options.workers,
        license_=options.license_,
        importances=matrix,
        restart=options.restart,
        quiet=options.quiet,
    )
    done = write_gguf(_padded(source, options), out, kinds, how)
    if matrix is not None:
        matrix.discard()
    weights = weights_in(options.padding.model(source.model))
    return [Quantized(done, _facts(out, kind, weights, importance=kind in weighed)) for kind in kinds]


def _padded(source: ModelSource, options: QuantizeOptions) -> _PaddedSource:
    model = options.padding.model(source.model)
    held = source.checkpoint if source.checkpoint is not None else source.directory
    assert held is not None
    return _PaddedSource(
        source.path,
        source.name,
        replace(source.architecture, model=model),
        source.config(dtype="float32") | options.padding.config(source.model),
        PaddedWeights(source.weights, model),
        source.tokenizer,
        source.checkpoint,
        held.digest(),
    )


def _facts(out: Path, kind: str, weights: int, *, importance: bool) -> ReleaseFacts:
    name = re.compile(rf".*-{kind}(-\d{{5}}-of-\d{{5}})?\.gguf")
    size = sum(path.stat().st_size for path in out.iterdir() if name.fullmatch(path.name))
    config = {"quant_method": GGUF, "kind": kind}
    return ReleaseFacts(f"{GGUF}:{kind}", config, IMPORTANCE if importance else NEAREST, size, 8 * size / weights)
