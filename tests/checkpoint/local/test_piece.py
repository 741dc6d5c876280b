"""A piece is what its name says, or it is none."""

import pytest
import torch
from safetensors import safe_open

from megatron_qwen.checkpoint.local.piece import (
    PieceError,
    PieceName,
    PieceWriter,
    StagedPiece,
    is_whole,
    parse,
    read_bytes,
)

TENSORS = {
    "flags": torch.tensor([True, False, True]),
    "weights": torch.arange(7, dtype=torch.bfloat16).view(7, 1),
    "moments": torch.linspace(-1, 1, 1001, dtype=torch.float32),
    "counts": torch.tensor([3, -4], dtype=torch.int64),
    "nothing": torch.empty(0, dtype=torch.float64),
}
FACTS = {"progress": {"iteration": 20}, "data": [1, "two", None]}


def written(directory, tensors=TENSORS):
    staged = StagedPiece()
    staged.fill(lambda: iter(tensors.items()), FACTS)
    writer = PieceWriter(directory)
    for chunk in staged.chunks():
        writer.write(chunk)
    name = PieceName(20, 3, 1, 4, "0123456789abcdef", writer.digest())
    writer.finish(name)
    return directory / str(name), name


def test_what_was_written_is_read(tmp_path):
    path, name = written(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [str(name)]
    content = read_bytes(path)
    tensors, facts = parse(content)
    assert facts == FACTS
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[key], value) for key, value in TENSORS.items())
    assert is_whole(content, name)


def test_it_is_a_file_of_safetensors(tmp_path):
    path, _ = written(tmp_path)
    with safe_open(path, "pt") as file:
        assert {key: file.get_tensor(key).tolist() for key in file.keys()} == {  # noqa: SIM118
            key: value.tolist() for key, value in TENSORS.items()
        }


def test_the_staging_memory_is_used_again():
    staged = StagedPiece()
    staged.fill(lambda: iter(TENSORS.items()), FACTS)
    place = staged.data.data_ptr()
    staged.fill(lambda: iter({**TENSORS, "counts": torch.tensor([5, 6])}.items()), FACTS)
    assert staged.data.data_ptr() == place
    content = torch.cat([torch.frombuffer(bytearray(chunk), dtype=torch.uint8) for chunk in staged.chunks()])
    assert parse(content)[0]["counts"].tolist() == [5, 6]


def test_any_flipped_bit_is_noticed(tmp_path):
    path, _ = written(tmp_path)
    whole = path.read_bytes()
    for place in (0, 9, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(PieceError, match="has other bytes than when it was written"):
            read_bytes(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(PieceError, match="has other bytes"):
        read_bytes(path)
    path.write_bytes(whole)
    read_bytes(path)
    path.unlink()
    with pytest.raises(PieceError, match="cannot be read"):
        read_bytes(path)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 40, (2).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"]
)
def test_what_is_no_piece_is_refused(content):
    with pytest.raises(PieceError, match="its header cannot be read"):
        parse(torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8))


def test_a_piece_that_arrives_changed_is_not_kept(tmp_path):
    writer = PieceWriter(tmp_path)
    writer.write(memoryview(b"abc"))
    with pytest.raises(PieceError, match="arrived with other bytes"):
        writer.finish(PieceName(1, 1, 0, 2, "0" * 16, "0" * 32, "held"))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there_fails_at_the_end(tmp_path):
    """So that a partner that sends is not left waiting."""
    writer = PieceWriter(tmp_path / "gone")
    writer.write(memoryview(b"abc"))
    with pytest.raises(FileNotFoundError):
        writer.finish(PieceName(1, 1, 0, 2, "0" * 16, writer.digest()))


def test_names_are_read_as_they_are_written():
    name = PieceName(12, 3, 5, 16, "0123456789abcdef", "f" * 32, "held")
    assert PieceName.of(str(name)) == name
    for odd in ("x", f".{name}.1f0c93ab.tmp", str(name).replace("held", "lent"), str(name) + "~"):
        assert PieceName.of(odd) is None
