"""Files that cannot be trusted are refused with a message; the values of every type are those of the C functions."""

import ctypes
import random
import struct
from pathlib import Path

import pytest
import torch
import xllamacpp

from checkpoints_convert.formats.gguf.container import Placed, Value, ValueType, header, padding, text, uint32
from checkpoints_convert.formats.gguf.dequantize import dequantize
from checkpoints_convert.formats.gguf.ggml_library import quantize
from checkpoints_convert.formats.gguf.parsing import parse
from checkpoints_convert.formats.gguf.reading import GgufFile
from checkpoints_convert.formats.gguf.types import GgmlType
from checkpoints_convert.formats.gguf.writing import GgufOptions, write_gguf
from megatron_qwen.errors import ConversionError
from tests.tiers import count

HEAD = struct.Struct("<IQQ")


@pytest.fixture(scope="module")
def good(side, tmp_path_factory):
    out = tmp_path_factory.mktemp("gguf") / "out"
    write_gguf(side("qwen2 narrow"), out, ["Q4_0"], GgufOptions(name="m", quiet=True))
    return (out / "m-Q4_0.gguf").read_bytes()


def refused(data: bytes, folder: Path) -> str:
    path = folder / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ConversionError) as caught:
        GgufFile(path)
    assert caught.value.exit_code == 3
    return caught.value.render()


@pytest.mark.parametrize("kind", [kind for kind in GgmlType if kind.name.startswith("Q")])
def test_values_are_those_of_ggml(kind):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn((7, 512), generator=generator)
    rows[3] = 0
    packed = quantize(rows, kind, importances=None, pool=None, name="weight")
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    function = getattr(library, f"dequantize_row_{kind.name.replace('Q', 'q')}")
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    expected = torch.empty_like(rows)
    function(packed.data_ptr(), expected.data_ptr(), rows.numel())
    torch.testing.assert_close(dequantize(packed, kind), expected, rtol=0, atol=0)


def test_cut_off_anywhere(good, tmp_path):
    dice = random.Random(2)
    for length in [0, 3, 23, 24, 40, len(good) - 40, *(dice.randrange(len(good)) for _ in range(20))]:
        refused(good[:length], tmp_path)


def test_bits_flipped_in_the_header(good, tmp_path):
    """Whatever a header says, the answer is a file or a refusal."""
    dice, refusals = random.Random(3), 0
    end = good.index(b"blk.2.ffn_down.weight") + 40
    for _ in range(count(quick=60, thorough=1500)):
        data = bytearray(good)
        data[dice.randrange(end)] ^= 1 << dice.randrange(8)
        (tmp_path / "bad.gguf").write_bytes(data)
        try:
            GgufFile(tmp_path / "bad.gguf")
        except ConversionError:
            refusals += 1
    assert refusals


@pytest.mark.parametrize("counts", [(2**63, 1), (1, 2**63), (10**6, 0), (99_999, 0)])
def test_absurd_counts(good, counts, tmp_path):
    refused(good[:4] + HEAD.pack(3, *counts) + good[24:], tmp_path)


@pytest.mark.parametrize("version", [1, 2, 4, 0x03000000])
def test_other_versions(good, version, tmp_path):
    assert "version" in refused(good[:4] + struct.pack("<I", version) + good[8:], tmp_path)


def described(keys: dict[str, Value], tensors: list[tuple[str, tuple[int, ...], int, int]], values: int) -> bytes:
    """A file whose tensors are (name, shape, type, offset)."""
    parts = [header(keys, [])[:24].replace(HEAD.pack(3, 0, len(keys)), HEAD.pack(3, len(tensors), len(keys)))]
    for name, value in keys.items():
        parts += [struct.pack("<Q", len(name)), name.encode(), value.encoded()]
    for name, shape, kind, offset in tensors:
        parts += [struct.pack("<Q", len(name)), name.encode(), struct.pack("<I", len(shape))]
        parts += [struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)]
    data = b"".join(parts)
    return data + padding(len(data)) + bytes(values)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ([("a", (32,), 0, 0), ("b", (32,), 0, 64)], "over another"),
        ([("a", (32,), 0, 0), ("b", (32,), 0, 2**40)], "gap"),
        ([("a", (2**40,), 0, 0)], "cut off"),
        ([("a", (2**33, 2**33), 0, 0)], "shape"),
        ([("a", (33,), 8, 0)], "shape"),
        ([("a", (0,), 0, 0)], "shape"),
        ([("a", (32,), 99, 0)], "not supported"),
        ([("a", (1,) * 5, 0, 0)], "dimensions"),
        ([("a", (8,), 0, 0), ("a", (8,), 0, 32)], "twice"),
        ([("a" * 300, (8,), 0, 0)], "name"),
        ([("a", (8,), 0, 0)], "behind the last"),
    ],
)
def test_tensors_that_cannot_be(tensors, says, tmp_path):
    assert says in refused(described({}, tensors, 256), tmp_path)


def test_the_helper_makes_files_that_are_read(tmp_path):
    """Negative control of the test above."""
    (tmp_path / "good.gguf").write_bytes(described({"x": uint32(1)}, [("a", (8, 2), 0, 0), ("b", (32,), 0, 64)], 192))
    parsed = parse(tmp_path / "good.gguf")
    assert [(item.name, item.shape, item.rows) for item in parsed.tensors] == [("a", (2, 8), 2), ("b", (32,), 1)]
    assert parsed.keys == {"x": 1}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qwen2.block_count", uint32(10_000)),
        ("qwen2.block_count", text("3")),
        ("qwen2.block_count", Value(ValueType.INT64, -1)),
        ("qwen2.embedding_length", uint32(0)),
        ("qwen2.attention.head_count", Value(ValueType.UINT32, [7, 7, 7])),
        ("qwen2.attention.layer_norm_rms_epsilon", Value(ValueType.FLOAT32, float("nan"))),
        ("general.architecture", text("llama")),
        ("general.alignment", uint32(0)),
        ("general.alignment", uint32(31)),
        ("qwen2.rope.scaling.type", text("yarn")),
    ],
)
def test_keys_that_cannot_be(side, key, value, tmp_path):
    from checkpoints_convert.formats.gguf.model_keys import model_keys
    from checkpoints_convert.formats.gguf.names import gguf_tensors
    from checkpoints_convert.formats.gguf.types import KINDS

    source = side("qwen2 narrow")
    keys = model_keys(source.architecture, KINDS["F32"], name="m", license_=None) | {key: value}
    placed = [
        Placed(tensor.name, tensor.shape, GgmlType.F32, tensor.rows * tensor.columns * 4)
        for tensor in gguf_tensors(source.model)
    ]
    data = header(keys, placed) + bytes(sum(item.size + len(padding(item.size)) for item in placed))
    refused(data, tmp_path)


def test_experts_that_no_file_could_hold(tmp_path):
    keys = {
        "general.architecture": text("qwen3moe"),
        **{
            f"qwen3moe.{name}": uint32(number)
            for name, number in {
                "block_count": 9_000,
                "context_length": 64,
                "embedding_length": 32,
                "feed_forward_length": 32,
                "attention.head_count": 1,
                "attention.head_count_kv": 1,
                "attention.key_length": 32,
                "expert_count": 60_000,
                "expert_used_count": 1,
                "expert_feed_forward_length": 32,
            }.items()
        },
        "qwen3moe.attention.layer_norm_rms_epsilon": Value(ValueType.FLOAT32, 1e-6),
        "qwen3moe.rope.freq_base": Value(ValueType.FLOAT32, 1e4),
    }
    data = described(keys, [("token_embd.weight", (32, 2), 0, 0)], 256)
    assert "experts" in refused(data, tmp_path)


def test_other_files(tmp_path):
    assert "git-lfs" in refused(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", tmp_path)
    assert "no GGUF" in refused(b"PK\x03\x04" + bytes(100), tmp_path)
