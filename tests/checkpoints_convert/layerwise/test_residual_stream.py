"""The residual stream on the disk is that in memory, and survives a kill."""

import pytest
import torch

from checkpoints_convert.layerwise.residual_stream import StreamInMemory, StreamOnDisk

SHAPE = (3, 4, 8)


def states(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def fill(stream: StreamInMemory | StreamOnDisk, values: torch.Tensor, layer: int) -> None:
    for sequence in (2, 0, 1):
        stream.write(sequence, values[sequence])
    stream.advance(layer)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_what_is_written_is_read_behind_the_layer(kind, tmp_path):
    stream = StreamInMemory(3) if kind == "memory" else StreamOnDisk(tmp_path, SHAPE, torch.float32)
    for layer in range(3):
        fill(stream, states(layer), layer)
        assert all(torch.equal(stream.read(sequence), states(layer)[sequence]) for sequence in range(3))


def test_states_in_front_of_a_layer_stay_while_it_is_written(tmp_path):
    stream = StreamOnDisk(tmp_path, SHAPE, torch.float32)
    fill(stream, states(0), 0)
    stream.write(1, states(1)[1])
    assert torch.equal(stream.read(1), states(0)[1])


def test_bf16(tmp_path):
    stream = StreamOnDisk(tmp_path, SHAPE, torch.bfloat16)
    fill(stream, states(0).bfloat16(), 0)
    assert torch.equal(stream.read(2), states(0)[2].bfloat16())


def test_a_later_start_finds_the_layer_it_needs(tmp_path):
    first = StreamOnDisk(tmp_path, SHAPE, torch.float32)
    for layer in range(3):
        fill(first, states(layer), layer)
    # Killed while it wrote on; the layer between may not have been committed, so both files are there.
    first.write(0, states(3)[0])
    for layer in (1, 2):
        again = StreamOnDisk(tmp_path, SHAPE, torch.float32)
        assert again.resume(layer)
        assert torch.equal(again.read(1), states(layer)[1])
        fill(again, states(layer + 1), layer + 1)
    assert not StreamOnDisk(tmp_path, SHAPE, torch.float32).resume(0)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_not_taken(tmp_path):
    fill(StreamOnDisk(tmp_path, SHAPE, torch.float32), states(0), 0)
    path = tmp_path / "stream-00000.bin"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    assert not StreamOnDisk(tmp_path, SHAPE, torch.float32).resume(0)


def test_discarding_leaves_nothing(tmp_path):
    stream = StreamOnDisk(tmp_path, SHAPE, torch.float32)
    fill(stream, states(0), 0)
    stream.discard()
    assert list(tmp_path.iterdir()) == []
