"""What a command asks of calibration: on which data, how much of it, and where work is kept meanwhile."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
import xxhash

from checkpoints_convert.formats.quantized_format import QuantizedFormat
from checkpoints_convert.formats.quantized_linear import QuantizedLinear
from checkpoints_convert.model_source import ModelSource
from checkpoints_convert.quantize.calibrate import calibrate, calibration_identity
from checkpoints_convert.quantize.calibration_data import (
    SampleChoice,
    Samples,
    from_chats,
    from_run,
    from_texts,
    from_token_files,
)
from checkpoints_convert.quantize.calibration_options import CalibrationOptions, Method
from checkpoints_convert.quantize.calibration_source import CalibrationSource
from checkpoints_convert.quantize.names import AWQ, GPTQ, NEAREST, SMOOTHQUANT
from checkpoints_convert.quantize.padding import PaddedWeights, Padding
from checkpoints_convert.quantize.solved import SolvedLayers
from checkpoints_convert.quantize.solved_store import SolvedStore
from checkpoints_convert.release import identity_digest
from megatron_qwen.errors import ConfigError, Problem

_METHODS: dict[str, Method] = {GPTQ: "gptq", AWQ: "awq", SMOOTHQUANT: "smoothquant"}
# Which formats' values a method can make: AWQ chooses scales for four bits, SmoothQuant for rounded inputs.
_USES = {GPTQ: ("gptq-int4", "gptq-int8", "w4a16"), AWQ: ("awq-int4", "w4a16"), SMOOTHQUANT: ("w8a8",)}


@dataclass(frozen=True)
class CalibrationRequest:
    """On what a model is calibrated.

    Args:
        texts: files and folders of texts; none of the three takes what the run itself has read.
        chats: files of conversations.
        tokens: prefix of token files.
        choice: how many samples of which length.
        options: of the methods.
        restart: discard the layers of an unfinished calibration of anything else.
    """

    texts: tuple[Path, ...] = ()
    chats: tuple[Path, ...] = ()
    tokens: Path | None = None
    choice: SampleChoice = field(default_factory=SampleChoice)
    options: CalibrationOptions = field(default_factory=CalibrationOptions)
    restart: bool = False

    def require(self, source: ModelSource, format_: QuantizedFormat, method: str) -> None:
        """Refuses what cannot be made, before anything is written.

        Raises:
            ConfigError: the method is not one of the format, or there are no data.
        """
        if method == NEAREST:
            return
        problems = []
        if format_.name not in _USES[method]:
            fix = f"makes the values of {', '.join(_USES[method])}; omit it for the method that {format_.name} wants."
            problems.append(Problem("--method", method, fix))
        if (missing := self.missing(source)) is not None:
            problems.append(missing)
        if problems:
            raise ConfigError(problems)

    def missing(self, source: ModelSource) -> Problem | None:
        """What is wrong with the choice of data; None if nothing is."""
        given = {
            "--calibrate": self.texts[:1],
            "--calibrate-chats": self.chats[:1],
            "--calibrate-tokens": () if self.tokens is None else (self.tokens,),
        }
        named = {option: str(first[0]) for option, first in given.items() if first}
        if len(named) > 1:
            *_, last = named
            return Problem(last, named[last], f"only one of {', '.join(named)} can be given.")
        if source.tokenizer is None and (self.texts or self.chats):
            return Problem("--tokenizer", None, f"{source.path} has none, and texts have to be tokenized; name one.")
        if not named and source.checkpoint is None:
            fix = (
                "a directory does not say what it was trained on: name texts (--calibrate FILE), conversations "
                "(--calibrate-chats FILE) or token files (--calibrate-tokens PREFIX), or round without data "
                f"(--method {NEAREST})."
            )
            return Problem("--calibrate", None, fix)
        return None

    def samples(self, source: ModelSource) -> Samples:
        """The calibration data.

        Raises:
            DataError: files cannot be read, or hold too few tokens.
        """
        if self.tokens is not None:
            return from_token_files(self.tokens, self.choice)
        if self.texts or self.chats:
            assert source.tokenizer is not None
            if self.texts:
                return from_texts(self.texts, source.tokenizer, self.choice)
            return from_chats(self.chats, source.tokenizer, self.choice)
        assert source.checkpoint is not None
        return from_run(source.checkpoint.config, source.checkpoint.state.get("data"), self.choice)


@contextmanager
def solved_layers(
    source: ModelSource,
    format_: QuantizedFormat,
    method: str,
    *,
    padding: Padding,
    out: Path,
    request: CalibrationRequest,
) -> Iterator[SolvedLayers | None]:
    """The layers of a calibrated method; None of rounding to nearest.

    Args:
        source: what is quantized.
        format_: on whose grid.
        method: what makes the values.
        padding: of the release.
        out: the release; what is done is kept beside it until it is complete.
        request: on what, and how.
    """
    if method == NEAREST:
        yield None
        return
    assert format_.grid is not None
    work = calibration_folder(out)
    model = calibration_model(source, padding)
    yield _Calibration(model, _METHODS[method], format_, request, request.samples(source), work)
    shutil.rmtree(work, ignore_errors=True)


def calibration_folder(out: Path) -> Path:
    """Where solved layers are kept while a release is made."""
    return out.absolute().with_name(f".{out.name}.calibration")


def calibration_model(source: ModelSource, padding: Padding) -> CalibrationSource:
    """The model that is calibrated: the source's, in the shape that is written."""
    model = padding.model(source.model)
    config = source.config(dtype="float32") | padding.config(source.model)
    held = source.checkpoint if source.checkpoint is not None else source.directory
    assert held is not None
    # Of a checkpoint that another program wrote, config.json follows from the command, not from its files.
    described = json.dumps(config, sort_keys=True, default=str)
    digest = xxhash.xxh3_128_hexdigest(f"{held.digest()} {described}".encode())
    return CalibrationSource(PaddedWeights(source.weights, model), config, digest)


@dataclass(frozen=True)
class _Calibration:
    """A calibration that begins when its layers are wanted."""

    source: CalibrationSource
    method: Method
    format: QuantizedFormat
    request: CalibrationRequest
    samples: Samples
    work: Path

    @cached_property
    def digest(self) -> str:
        """Of everything that determines the layers."""
        assert self.format.grid is not None
        return identity_digest(
            calibration_identity(self.source, self.method, self.format.grid, self._options, self.samples)
        )

    @property
    def _options(self) -> CalibrationOptions:
        """With the order of columns that the format can store."""
        asked = self.request.options
        act_order = asked.gptq.act_order and self.format.name.startswith("gptq")
        return replace(asked, gptq=replace(asked.gptq, act_order=act_order), restart=self.request.restart)

    @cached_property
    def _store(self) -> SolvedStore:
        assert self.format.grid is not None
        return calibrate(
            self.source,
            method=self.method,
            grid=self.format.grid,
            samples=self.samples,
            options=self._options,
            work=self.work,
        )

    def prepare(self) -> None:
        """Finds the layers, or those that an earlier attempt has not found."""
        _ = self._store

    def linear(self, name: str) -> QuantizedLinear:
        """The codes of a weight."""
        return self._store.linear(name)

    def changed(self, name: str) -> torch.Tensor | None:
        """What the method made of a tensor that is not quantized."""
        return self._store.changed(name)
