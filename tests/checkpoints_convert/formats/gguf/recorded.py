"""What a recorded file holds, in short: how many tensors of each type, and the hash of them all."""

from collections import Counter
from pathlib import Path
from typing import Any

import xxhash
from gguf import GGUFReader

RECORD = Path(__file__).with_name("llama_quantize.json")


def summary(path: Path) -> dict[str, Any]:
    """Of a file, through the gguf package's own reader."""
    tensors = sorted(GGUFReader(path).tensors, key=lambda tensor: tensor.name)
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        shape = [int(length) for length in tensor.shape]
        digest.update(f"{tensor.name} {tensor.tensor_type.name} {shape}\n".encode())
        digest.update(tensor.data.tobytes())
    types = Counter(tensor.tensor_type.name for tensor in tensors)
    return {"types": dict(sorted(types.items())), "xxh3_128": digest.hexdigest()}
