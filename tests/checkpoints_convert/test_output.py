"""A file has what encodings make of whole weights, however their rows are cut into spans and blocks."""

import pytest
import torch
from safetensors.torch import load_file, save

from checkpoints_convert.encoding import SAME_NAME, Cast
from checkpoints_convert.output import OutputTensor, encoded_tensors, read_rows, safetensors_file
from tests.checkpoints_convert.encodings import Int8Blocks, Int8Rows, Int8Tensor, PackedColumns, Scattered

ROWS, COLUMNS = 22, 12
# Borders at rows 3, 8 and 12: a unit of 4 rows begins in the first span and ends in the second.
PARTS = (3, 5, 4, 10)


def scattered(**options) -> Scattered:
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    values[:, 2] *= 30
    values[5] = 0
    return Scattered(values, PARTS, **options)


def tensors(encoding) -> dict[str, OutputTensor]:
    outputs = encoded_tensors("mlp.weight", (ROWS, COLUMNS), scattered().spans, encoding)
    return {output.name: output for output in outputs}


@pytest.mark.parametrize(
    ("encoding", "limit", "blocks"),
    [
        # A block of rows that are alone ends with its span.
        (Cast(torch.float32), 10_000, [(0, 3), (3, 8), (8, 12), (12, 22)]),
        (Cast(torch.float32), 4 * COLUMNS * 4, [(0, 3), (3, 7), (7, 8), (8, 12), (12, 16), (16, 20), (20, 22)]),
        # Four rows stay together, also where they are in two spans.
        (Int8Blocks(), 10_000, [(0, 8), (8, 12), (12, 22)]),
        (Int8Blocks(), 9 * COLUMNS * 4, [(0, 8), (8, 12), (12, 20), (20, 22)]),
        (Int8Blocks(), 1, [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20), (20, 22)]),
        (PackedColumns(), 1, [(0, ROWS)]),
    ],
)
def test_blocks(encoding, limit, blocks):
    for output in tensors(encoding).values():
        if output.rows > 1:
            assert output.blocks(limit) == blocks
            assert all((stop - start) * output.row_bytes <= max(limit, output.unit_bytes) for start, stop in blocks)


def test_rows_are_counted_in_the_format_they_are_encoded_in():
    """One byte is written of four that are computed with."""
    assert tensors(Cast(torch.bfloat16))["mlp.weight"].row_bytes == COLUMNS * 2
    assert {output.row_bytes for output in tensors(Int8Blocks()).values()} == {COLUMNS * 4}
    assert tensors(Int8Blocks())["mlp.weight"].unit_bytes == 4 * COLUMNS * 4
    assert tensors(PackedColumns())["mlp.qweight"].unit_bytes == ROWS * COLUMNS * 4


def test_rows_of_several_spans():
    source = scattered()
    for start in range(ROWS):
        for stop in range(start + 1, ROWS + 1):
            assert torch.equal(read_rows(source.spans, start, stop), source.values[start:stop])


def written(outputs: list[OutputTensor], path, limit: int) -> bytes:
    file = safetensors_file("model.safetensors", outputs)
    content = file.header
    for output in file.tensors:
        for start, stop in output.blocks(limit):
            content += output.values(start, stop).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert len(content) == file.size
    path.write_bytes(content)
    return content


@pytest.mark.parametrize("limit", [1, 300, 10_000])
def test_a_file_of_encoded_weights(limit, tmp_path):
    """Against the encoding of a whole weight, and the bytes of the library."""
    whole = scattered().values
    spans = scattered().spans
    encodings = {
        "a.weight": Int8Rows(),
        "b.weight": Int8Blocks(),
        "c.weight": PackedColumns(),
        "d.weight": Int8Tensor(spans),
        "e.weight": Cast(torch.bfloat16),
    }
    outputs = [output for name, one in encodings.items() for output in encoded_tensors(name, whole.shape, spans, one)]
    content = written(outputs, tmp_path / "model.safetensors", limit)
    found = load_file(tmp_path / "model.safetensors")
    expected = {}
    for name, encoding in encodings.items():
        module = name.removesuffix(".weight")
        made = encoding.encode(whole, name=name)
        for part, described in encoding.tensors(tuple(whole.shape)).items():
            value = described.value() if described.value else made[part]
            expected[f"{module}.{part}" if part else name] = value.contiguous()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items())
    assert content == save(expected, metadata={"format": "pt"})
    assert found["a.weight_shape"].tolist() == [ROWS, COLUMNS]
    assert found["d.weight_scale"].shape == ()

    # The scales belong to the values they are for.
    sides = found["b.weight_scale_inv"].repeat_interleave(4, 0)[:ROWS].repeat_interleave(4, 1)[:, :COLUMNS]
    for name, scale in {"a": found["a.weight_scale"], "b": sides, "d": found["d.weight_scale"]}.items():
        difference = (found[f"{name}.weight"].float() * scale - whole.float()).abs()
        assert bool((difference <= 0.51 * scale).all()), name
    assert len(found["b.weight_scale_inv"].unique()) > 10


def test_a_cast_keeps_name_and_bits():
    (output,) = encoded_tensors("norm.weight", (ROWS, COLUMNS), scattered().spans, Cast(torch.bfloat16))
    assert (output.name, output.part) == ("norm.weight", SAME_NAME)
    assert torch.equal(output.values(0, ROWS), scattered().values)
