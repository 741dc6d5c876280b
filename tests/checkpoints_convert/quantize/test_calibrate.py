"""A calibration as a whole: quality, the same bytes after kills and with any number of workers, refusals."""

import logging
import subprocess
import sys

import pytest
import torch

from checkpoints_convert.formats.quantized_format import is_quantized
from checkpoints_convert.formats.quantized_linear import Grid
from checkpoints_convert.progress import free_bytes
from checkpoints_convert.quantize import calibrate as calibrate_module
from checkpoints_convert.quantize.calibrate import calibrate
from checkpoints_convert.quantize.calibration_data import Samples
from checkpoints_convert.quantize.calibration_options import CalibrationOptions
from checkpoints_convert.quantize.calibration_room import solved_bytes
from checkpoints_convert.quantize.gptq import GptqOptions
from megatron_qwen.errors import ConfigError, ConversionError, DataError, DiskFullError
from tests.checkpoints_convert.quantize.trained import divergence, logits, made, opened, samples, tokens
from tests.conftest import ROOT, small_disk
from tests.tiers import cases, count

INT4 = Grid(4, 128, False, torch.float16)
GRIDS = {"gptq": Grid(4, 128, True, torch.float16), "awq": INT4, "smoothquant": Grid(8, None, True, torch.float32)}


def run(source, work, *, method="gptq", data=None, progress=lambda progress: None, **options):
    options = CalibrationOptions(**{"workers": 2} | options)
    data = data or samples(6, 32)
    return calibrate(
        source, method=method, grid=GRIDS[method], samples=data, options=options, work=work, progress=progress
    )


def bytes_of(store):
    return {path.name: path.read_bytes() for path in sorted(store.directory.glob("layer-*"))}


def quantized(source, store):
    found = {}
    for name in source.weights.tensors:
        if is_quantized(name):
            found[name] = store.linear(name).values()
        elif (changed := store.changed(name)) is not None:
            found[name] = changed
    return found


@pytest.mark.parametrize(
    ("name", "method"),
    cases(
        [("qwen2", "gptq"), ("qwen2", "awq"), ("qwen2_moe", "gptq")],
        [(name, method) for name in ("qwen2 full heads", "qwen3", "qwen3_moe") for method in ("gptq", "awq")],
    ),
)
def test_closer_to_the_model_than_nearest(name, method, tmp_path_factory, tmp_path):
    directory = made(name, tmp_path_factory)
    source, ids = opened(directory), tokens(4, 64, seed=50)
    reference = logits(directory, ids)
    store = run(source, tmp_path, method=method, data=samples(24))
    nearest = {
        name: GRIDS[method].nearest(source.weights.rows(name, 0, info.shape[0])).values()
        for name, info in source.weights.tensors.items()
        if is_quantized(name)
    }
    ours, theirs = (
        divergence(reference, logits(directory, ids, weights)) for weights in (quantized(source, store), nearest)
    )
    assert ours < 0.8 * theirs


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("name", cases(["qwen2"], ["qwen2_moe"]))
def test_same_bytes_with_any_workers_memory_and_stream(name, method, tmp_path_factory, tmp_path):
    source = opened(made(name, tmp_path_factory))
    first = run(source, tmp_path / "a", method=method, workers=1)
    # A Hessian at a time, and the stream in a file.
    other = run(source, tmp_path / "b", method=method, workers=3, memory_bytes=1, stream="auto")
    assert bytes_of(first) == bytes_of(other)
    assert not list((tmp_path / "b" / method / "stream").iterdir())


class Killed(BaseException):
    """As a signal would end it."""


@pytest.mark.parametrize("stream", ["memory", "disk"])
@pytest.mark.parametrize("method", cases(["gptq"], ["awq", "smoothquant"]))
def test_same_bytes_after_an_interruption_at_every_place(method, stream, tmp_path_factory, tmp_path, monkeypatch):
    """Ends at the n-th call of what runs, writes or publishes, for every n, and starts again in the same directory."""
    from checkpoints_convert.layerwise.layer_runner import LayerRunner
    from checkpoints_convert.quantize import solved_store

    source = opened(made("qwen2", tmp_path_factory))
    expected = bytes_of(run(source, tmp_path / "whole", method=method))
    left = 0

    def before(call):
        def may_end(*arguments, **named):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return call(*arguments, **named)

        return may_end

    for owner, name in (
        (LayerRunner, "load"), (LayerRunner, "watch"), (LayerRunner, "advance"), (solved_store, "atomic_write"),
        (solved_store, "atomic_path"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, before(getattr(owner, name)))
    ends = 0
    while True:
        left = 3 + 4 * ends
        try:
            store = run(source, tmp_path / "killed", method=method, stream=stream)
            break
        except Killed:
            ends += 1
    assert ends >= 2
    assert bytes_of(store) == expected


_PROGRAM = """
import sys
from pathlib import Path
from tests.checkpoints_convert.quantize.test_calibrate import run
from tests.checkpoints_convert.quantize.trained import opened
run(opened(Path(sys.argv[1])), Path(sys.argv[2]), stream=sys.argv[3])
"""


@pytest.mark.parametrize("stream", ["memory", "disk"])
def test_same_bytes_after_kills(stream, tmp_path_factory, tmp_path):
    """SIGKILL at moments that are spread over the run; a kill during the imports does no harm either."""
    directory = made("qwen2", tmp_path_factory)
    kills = count(quick=0, thorough=15)
    if not kills:
        pytest.skip("thorough tier: every start imports transformers")
    expected = bytes_of(run(opened(directory), tmp_path / "whole"))
    command = [sys.executable, "-c", _PROGRAM, str(directory), str(tmp_path / "killed"), stream]
    for number in range(kills):
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            process.wait(timeout=4 + 0.3 * number)
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
    assert bytes_of(run(opened(directory), tmp_path / "killed", stream=stream)) == expected


def test_layers_that_are_done_are_kept(tmp_path_factory, tmp_path):
    source = opened(made("qwen2", tmp_path_factory))
    seen = []
    store = run(source, tmp_path, progress=seen.append)
    assert [(one.done, one.kept) for one in seen] == [(0, 0), (1, 0), (2, 0)]
    assert seen[0].seconds_left is None
    assert seen[1].seconds_left == pytest.approx(seen[1].seconds)
    assert "calibrated 1 of 2 layers" in str(seen[1])
    assert min(seen[1].layer.run, seen[1].layer.sums, seen[1].layer.solve) > 0
    written = {path: path.stat().st_mtime_ns for path in store.directory.iterdir()}
    again = []
    run(source, tmp_path, progress=again.append)
    assert [(one.done, one.kept) for one in again] == [(2, 2)]
    assert {path: path.stat().st_mtime_ns for path in store.directory.iterdir()} == written
    # A damaged layer is solved again, from what the layers before it give.
    expected = bytes_of(store)
    path = store.directory / "layer-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    run(source, tmp_path)
    assert bytes_of(store) == expected


def test_a_disk_that_fills_up_keeps_what_is_solved(tmp_path_factory, tmp_path, monkeypatch):
    source = opened(made("qwen2", tmp_path_factory))
    expected = bytes_of(run(source, tmp_path / "whole"))
    layer = len(expected["layer-00000.safetensors"])
    with small_disk(tmp_path / "disk", "4m") as disk:
        filler = disk / "filler"
        filler.write_bytes(bytes(free_bytes(disk) - int(1.5 * layer)))
        with pytest.raises(DiskFullError, match="are needed for the calibration"):
            run(source, disk / "work")
        monkeypatch.setattr(calibrate_module, "require_room", lambda directory, needed: None)
        with pytest.raises(DiskFullError, match="Layers that are solved are kept"):
            run(source, disk / "work")
        monkeypatch.undo()
        filler.unlink()
        seen = []
        assert bytes_of(run(source, disk / "work", progress=seen.append)) == expected
        assert seen[0].kept == 1


def test_room_for_the_hidden_states(tmp_path_factory, tmp_path):
    source = opened(made("qwen2", tmp_path_factory))
    with small_disk(tmp_path / "disk", "1m") as disk, pytest.raises(DiskFullError, match="are needed for the calib"):
        run(source, disk, data=samples(32, 32), stream="disk")


@pytest.mark.parametrize("method", ["gptq", "smoothquant"])
def test_bytes_of_solved_layers_are_known_before(method, tmp_path_factory, tmp_path):
    """Within the headers and the tensors that are not quantized."""
    source = opened(made("qwen2", tmp_path_factory))
    store = run(source, tmp_path, method=method)
    written = sum(path.stat().st_size for path in store.directory.glob("*.safetensors"))
    assert 0.9 * written < solved_bytes(source.weights, GRIDS[method]) < written


def test_another_calibration_in_the_same_place(tmp_path_factory, tmp_path):
    source = opened(made("qwen2", tmp_path_factory))
    run(source, tmp_path)
    with pytest.raises(ConversionError, match=r"options\.damping was 0\.01, is 0\.1"):
        run(source, tmp_path, gptq=GptqOptions(damping=0.1))
    with pytest.raises(ConversionError, match=r"samples\.xxh3_128 was"):
        run(source, tmp_path, data=samples(6, 32, seed=2))
    run(source, tmp_path, gptq=GptqOptions(damping=0.1), restart=True)


def test_an_expert_without_tokens_is_rounded_to_nearest(tmp_path_factory, tmp_path, caplog):
    source = opened(made("qwen3_moe", tmp_path_factory))
    with caplog.at_level(logging.WARNING):
        store = run(source, tmp_path, data=samples(1, 2))
    assert "no token of the calibration data reached them" in caplog.text
    nearest = 0
    for index in range(4):
        name = f"model.layers.0.mlp.experts.{index}.gate_proj.weight"
        weight = source.weights.rows(name, 0, source.weights.tensors[name].shape[0])
        nearest += torch.equal(store.linear(name).codes, GRIDS["gptq"].nearest(weight).codes)
    assert 0 < nearest < 4


def test_what_is_refused(tmp_path_factory, tmp_path):
    source = opened(made("qwen2", tmp_path_factory))
    with pytest.raises(ConfigError) as caught:
        run(source, tmp_path, gptq=GptqOptions(damping=0.0), alpha=2.0, workers=0)
    assert [problem.where for problem in caught.value.problems] == ["damping", "alpha", "workers"]
    other = Samples(samples(1, 8).ids + 200, "made up")
    with pytest.raises(DataError, match="is not among the 256 ids"):
        run(source, tmp_path, data=other)
    with pytest.raises(ConversionError, match=r"self_attn.q_proj.weight = \[128, 128\].*group of 96"):
        calibrate(
            source,
            method="gptq",
            grid=Grid(4, 96, True, torch.float16),
            samples=samples(1, 8),
            options=CalibrationOptions(),
            work=tmp_path,
        )
    assert not list(tmp_path.iterdir())
