"""Calibrates a model layer by layer: runs it over samples, and rounds every layer by a method that sees its inputs."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from checkpoints_convert.formats.quantized_format import is_quantized
from checkpoints_convert.formats.quantized_linear import Grid
from checkpoints_convert.layerwise.layer_runner import LayerRunner
from checkpoints_convert.layerwise.layered import EMBEDDING
from checkpoints_convert.layerwise.layered_hf import HfLayers
from checkpoints_convert.layerwise.residual_stream import StreamInMemory, StreamOnDisk
from checkpoints_convert.layerwise.workers import Workers, usable_cores
from checkpoints_convert.memory import available_bytes
from checkpoints_convert.progress import gb
from checkpoints_convert.quantize import awq, gptq, smoothquant
from checkpoints_convert.quantize.calibration_data import Samples
from checkpoints_convert.quantize.calibration_options import CalibrationOptions, Method
from checkpoints_convert.quantize.calibration_progress import LayerClock, TakeProgress, shown_on
from checkpoints_convert.quantize.calibration_room import full_disk_told, require_room, solved_bytes
from checkpoints_convert.quantize.calibration_source import CalibrationSource
from checkpoints_convert.quantize.layer_solution import CalibratedLayer, LayerSolution
from checkpoints_convert.quantize.solved_store import SolvedStore
from megatron_qwen import device
from megatron_qwen.errors import ConversionError, Problem
from megatron_qwen.provenance import code_version

log = logging.getLogger(__name__)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of the memory that a calibration may take: a part for the residual stream, a part for the Hessians of a turn. A layer,
# its inputs, and two more matrices of a Hessian's size while it is factorised take the rest.
_PART = 4
_OF_FREE = 2
_STREAM = "stream"


def calibrate(
    source: CalibrationSource,
    *,
    method: Method,
    grid: Grid,
    samples: Samples,
    options: CalibrationOptions,
    work: Path,
    progress: TakeProgress | None = None,
) -> SolvedStore:
    """Solves all layers of a model, or those that an earlier start has not solved.

    GPTQ runs a layer on what the rounded layers before it give. AWQ and SmoothQuant take the inputs of the model as it
    is, as their papers do: they choose scales by the size of inputs, and do not make up for errors.

    Args:
        source: the model.
        method: ``gptq``, ``awq`` (scales and clipping, then nearest) or ``smoothquant`` (scales, then nearest).
        grid: what weights can be.
        samples: calibration data.
        options: of the method, and what it may take.
        work: directory for the solved layers and, where it does not fit into memory, the residual stream.
        progress: told of every layer; None shows it on stderr.

    Returns:
        The solved layers. The same bytes whatever was killed before, and whatever the number of workers; on processors
        of one kind, with the same number of threads for LAPACK (``torch.get_num_threads``).

    Raises:
        ConfigError: an option is out of range.
        ConversionError: the model is damaged, a shape is not a multiple of the group, or ``work`` has layers of another
            calibration.
        DiskFullError: there is not enough room; layers that are solved stay.
    """
    options.check()
    _require_groups(source, grid)
    determined = _determined(method, grid, options)

    def solve(layer: CalibratedLayer) -> LayerSolution:
        if method == "gptq":
            return gptq.solve_layer(layer, grid, options.gptq)
        if method == "awq":
            return awq.solve_layer(layer, grid, options.awq)
        return smoothquant.solve_layer(layer, grid, alpha=options.alpha)

    rounded = method == "gptq"
    return solve_layers(
        source,
        method,
        determined,
        solve,
        rounded,
        samples=samples,
        options=options,
        work=work,
        progress=progress,
        grid=grid,
    )


def calibration_identity(
    source: CalibrationSource, method: Method, grid: Grid, options: CalibrationOptions, samples: Samples
) -> dict[str, Any]:
    """Everything that determines the layers that ``calibrate`` gives; it is known before they are."""
    return layers_identity(source, method, _determined(method, grid, options), options, samples)


def _determined(method: Method, grid: Grid, options: CalibrationOptions) -> dict[str, Any]:
    return {**options.of_method(method), "grid": {**asdict(grid), "scale_dtype": str(grid.scale_dtype)}}


def solve_layers(
    source: CalibrationSource,
    method: str,
    determined: Mapping[str, Any],
    solve: Callable[[CalibratedLayer], LayerSolution],
    rounded: bool,
    *,
    samples: Samples,
    options: CalibrationOptions,
    work: Path,
    progress: TakeProgress | None,
    grid: Grid | None = None,
) -> SolvedStore:
    """Calls ``solve`` on every layer that an earlier start has not solved, and keeps what it gives.

    Args:
        source: the model.
        method: name of the method, which names its folder in ``work``.
        determined: options that determine its results.
        solve: the method.
        rounded: whether ``solve`` leaves the layer with the rounded weights, which then give the next layer's inputs.
        samples: calibration data.
        options: what it may take.
        work: directory.
        progress: told of every layer; None shows it on stderr.
        grid: of what is kept; None where only statistics of columns are.

    Raises:
        ConversionError: ``work`` has layers of another calibration.
        DataError: the samples have ids that the model does not have.
        DiskFullError: there is not enough room for the layers; those that are solved stay.
    """
    options.check()
    samples.require_vocabulary(source.weights.tensors[EMBEDDING].shape[0])
    identity = layers_identity(source, method, determined, options, samples)
    store = SolvedStore.open(work / method, identity, layers=source.layers, restart=options.restart)
    done = store.completed()
    clock = LayerClock(source.layers, kept=done, take=progress or shown_on())
    if done == source.layers:
        return store
    require_room(work, solved_bytes(source.weights, grid) * (source.layers - done) // source.layers)
    with full_disk_told(work), _runner(source, samples, options, work / method) as (runner, memory):
        _skip(runner, store, done, rounded=rounded)
        clock.begin(run=runner.run_seconds, sums=runner.taking_seconds)
        for index in range(done, source.layers):
            runner.load(index)
            solution = solve(CalibratedLayer(index, source.weights, runner, budget=memory // _PART))
            if solution.untouched:
                fix = "experts' linears were rounded to nearest: no token of the calibration data reached them"
                log.warning("layer %d: %d %s", index, len(solution.untouched), fix)
            if index + 1 < source.layers:
                runner.advance(index + 1)
            store.commit(index, solution)
            clock.done(index + 1, run=runner.run_seconds, sums=runner.taking_seconds)
    return store


@contextmanager
def _runner(
    source: CalibrationSource, samples: Samples, options: CalibrationOptions, work: Path
) -> Iterator[tuple[LayerRunner, int]]:
    """The model at its first layer, and the bytes that the calibration may take."""
    place, dtype = device.current(), _DTYPES[options.dtype]
    memory = options.memory_bytes or available_bytes() // _OF_FREE
    count, length = samples.ids.shape
    size = count * length * int(source.config["hidden_size"]) * dtype.itemsize
    on_disk = options.stream == "disk" or (options.stream == "auto" and size > memory // _PART)
    shape = (count, length, int(source.config["hidden_size"]))
    if on_disk:
        require_room(work, 2 * size)
    stream = StreamOnDisk(work / _STREAM, shape, dtype) if on_disk else StreamInMemory(count)
    where = f"in {work / _STREAM}, twice that of disk" if on_disk else "in memory"
    log.info("hidden states of %d x %d tokens: %s %s", count, length, gb(size), where)
    threads = 1 if place.type == "cuda" else options.workers or usable_cores()
    with Workers(threads) as workers:
        layers = HfLayers(source.weights, source.config, dtype=dtype, place=place)
        yield LayerRunner(layers, samples.ids, stream, workers=workers, place=place), memory
    stream.discard()


def _skip(runner: LayerRunner, store: SolvedStore, done: int, *, rounded: bool) -> None:
    """Brings the stream in front of the first layer that is not solved.

    What an earlier start left on the disk is taken; otherwise the layers before it run again, as they ran then.
    """
    if isinstance(runner.stream, StreamOnDisk) and runner.stream.resume(done):
        return
    runner.embed()
    for index in range(done):
        runner.load(index)
        for name in store.linears(index) if rounded else ():
            module = name.split(".", 3)[3].removesuffix(".weight")
            runner.replace(module, store.linear(name).values())
        runner.advance(index + 1)


def _require_groups(source: CalibrationSource, grid: Grid) -> None:
    """Raises ConversionError if groups do not fit into rows; names every such shape once."""
    if grid.group is None:
        return
    shapes = {
        (name.split(".", 3)[3], info.shape)
        for name, info in source.weights.tensors.items()
        if is_quantized(name) and info.shape[1] % grid.group
    }
    fix = (
        f"has rows that are no multiple of the group of {grid.group}; choose another group or format, or pad the model."
    )
    if shapes:
        raise ConversionError([Problem(name, list(shape), fix) for name, shape in sorted(shapes)[:10]])


def layers_identity(
    source: CalibrationSource, method: str, determined: Mapping[str, Any], options: CalibrationOptions, samples: Samples
) -> dict[str, Any]:
    """Everything that determines the layers that ``solve_layers`` gives; it is known before they are."""
    return {
        "source": source.digest,
        "method": method,
        "options": dict(determined),
        "dtype": options.dtype,
        "device": device.current().type,
        "samples": {"xxh3_128": samples.digest, "shape": list(samples.ids.shape)},
        "code": code_version(),
    }
