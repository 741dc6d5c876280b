"""Headers are those of the safetensors library."""

import torch
from safetensors.torch import save

from checkpoints_convert.safetensors_format import DTYPE_NAMES, header, in_file_order


def test_every_format_is_where_the_library_puts_it():
    formats = {name: getattr(torch, name) for name in DTYPE_NAMES}
    tensors = {
        f"{letter}.{name}": torch.zeros(rows, 3, dtype=dtype)
        for name, dtype in formats.items()
        for letter, rows in (("b", 2), ("a", 5))
    }
    described = [(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
    ordered = in_file_order(described, key=lambda item: (item[1], item[0]))
    expected = save(tensors, metadata={"format": "pt"})
    assert header(ordered) == expected[: len(header(ordered))]
    assert len(expected) - len(header(ordered)) == sum(value.nbytes for value in tensors.values())
