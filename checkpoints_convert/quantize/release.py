"""Several formats of one model: a folder with a release each, and a table of them."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from checkpoints_convert.formats.quantized_format import QuantizedFormat
from checkpoints_convert.model_source import ModelSource
from checkpoints_convert.quantize import gguf
from checkpoints_convert.quantize.calibration_request import CalibrationRequest, calibration_folder, solved_layers
from checkpoints_convert.quantize.card import folder_card
from checkpoints_convert.quantize.names import GGUF, SAFETENSORS_FORMATS, default_method
from checkpoints_convert.quantize.plan import require_shapes
from checkpoints_convert.quantize.run import Quantized, QuantizeOptions, quantize
from checkpoints_convert.release import MANIFEST
from checkpoints_convert.work import OccupiedError, require_free, require_name
from megatron_qwen.errors import ConfigError, ConversionError, Problem
from megatron_qwen.files import atomic_write, is_temporary

log = logging.getLogger(__name__)
README = "README.md"
_ROW = re.compile(r"\| \[([\w-]+)\]\(")  # of the table of a folder's card


def quantize_all(
    source: ModelSource,
    out: Path,
    formats: Sequence[QuantizedFormat],
    *,
    method: str | None,
    options: QuantizeOptions,
    request: CalibrationRequest,
    gguf_kinds: Sequence[str] = (),
    importance: bool = False,
    single: bool = False,
    say: Callable[[Quantized], None] = lambda _: None,
) -> list[Quantized]:
    """Writes a release in every format, one after the other; those that are complete stay as they are.

    Args:
        source: what to quantize.
        out: the release where there is one, else the folder of a release each.
        formats: in which formats.
        method: what makes the values; None is every format's own.
        options: how; the method in them counts for nothing.
        request: on which data methods are calibrated.
        gguf_kinds: kinds of GGUF files to write as well.
        importance: whether GGUF files are made with an importance matrix.
        single: whether ``out`` is the release itself.
        say: told of every release when it is complete.

    Raises:
        ConfigError: a method that a format has no use for, or no data to calibrate on.
        ConversionError: a format cannot hold a weight (before anything is written), or ``out`` is occupied.
    """
    require_name(out)
    methods = {one.name: method or default_method(one.name) for one in formats}
    _require_methods(source, formats, methods, request, importance=importance)
    _require_all_shapes(source, formats, options)
    if gguf_kinds:
        gguf.require(source, out if single else out / GGUF, gguf_kinds, options)
    if not single:
        _claim_folder(out)
    found = []

    def keep(one: Quantized) -> None:
        found.append(one)
        say(one)

    for one in formats:
        where = out if single else out / one.name
        how = replace(options, method=methods[one.name])
        with solved_layers(source, one, how.method, padding=how.padding, out=where, request=request) as solved:
            keep(quantize(source, where, one, how, solved=solved))
    if gguf_kinds:
        where = out if single else out / GGUF
        for written in gguf.write(source, where, gguf_kinds, options, importance=importance, request=request):
            keep(written)
    if not single:
        _write_table(source, out, found, license_=options.license_)
    return found


def _require_methods(
    source: ModelSource,
    formats: Sequence[QuantizedFormat],
    methods: Mapping[str, str],
    request: CalibrationRequest,
    *,
    importance: bool,
) -> None:
    problems: dict[str, Problem] = {}  # what is missing for one is missing for all
    for one in formats:
        try:
            request.require(source, one, methods[one.name])
        except ConfigError as error:
            problems |= {str(problem): problem for problem in error.problems}
    if importance and (missing := request.missing(source)) is not None:
        problems[str(missing)] = missing
    if problems:
        raise ConfigError(list(problems.values()))


def _require_all_shapes(source: ModelSource, formats: Sequence[QuantizedFormat], options: QuantizeOptions) -> None:
    problems: list[Problem] = []
    for one in formats:
        try:
            require_shapes(options.padding.model(source.model), one)
        except ConversionError as error:
            problems += error.problems
    if problems:
        raise ConversionError(problems)


def _claim_folder(out: Path) -> None:
    """Makes the folder; one that holds nothing but releases is completed by the same command.

    Raises:
        OccupiedError: something else is in it.
    """
    if out.is_symlink() or not out.is_dir():
        require_free(out)
        out.mkdir(parents=True, exist_ok=True)
        return
    releases = {GGUF, *SAFETENSORS_FORMATS}
    ours = {README, *releases, *(f".{name}.partial" for name in releases)}
    ours |= {calibration_folder(out / name).name for name in releases}
    others = sorted(path.name for path in out.iterdir() if path.name not in ours and not is_temporary(path))
    if others:
        fix = f"holds other things than releases ({', '.join(others[:3])}); name a new directory."
        raise OccupiedError(Problem(str(out), None, fix))


def _write_table(source: ModelSource, out: Path, found: Sequence[Quantized], *, license_: str | None) -> None:
    """The folder's card: a line of each of these releases, and the lines of those that were there before."""
    path = out / README
    text = path.read_text() if path.is_file() else ""
    made = {one.done.out.name for one in found}
    kept = [
        line
        for line in text.splitlines()
        if (match := _ROW.match(line)) and match[1] not in made and (out / match[1] / MANIFEST).is_file()
    ]
    card = folder_card(source, [(one.done.out.name, one.facts) for one in found], kept=kept, license_=license_)
    atomic_write(path, card)
