"""Reads what Megatron-LM saves besides tensors, its arguments and counters, from a pickle that is not trusted.

It is in common.pt or, since megatron-core 0.19, in the shards under the name ``common_state``. Both are torch.save
archives. The unpickler knows plain containers, argparse's Namespace and a few names whose objects it replaces by inert
ones; anything else is refused before it is looked up.
"""

import collections
import io
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_qwen.checkpoint.metadata import FrozenType, read_metadata
from megatron_qwen.errors import CheckpointError, Problem

COMMON = "common.pt"
_IN_SHARDS = "common_state/shard_0_1"
# Bound on what is read at once, so that a length in a crafted file cannot fill the memory. Chosen by hand, far above
# what arguments and counters take.
_LARGEST = 1 << 30


class _Inert(metaclass=FrozenType):
    """Replaces an object that is not needed here; none of its code runs."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...


class _Namespace(SimpleNamespace, metaclass=FrozenType):
    """argparse's Namespace, its attributes without its class."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


_ALLOWED: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): _Namespace,
    ("types", "SimpleNamespace"): _Namespace,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "dict"): dict,
    ("builtins", "list"): list,
    ("builtins", "tuple"): tuple,
    ("torch", "Size"): tuple,
    ("pathlib", "PosixPath"): _Inert,
    ("pathlib._local", "PosixPath"): _Inert,
    ("signal", "Signals"): _Inert,
    ("_io", "BytesIO"): _Inert,
    ("_codecs", "encode"): _Inert,
    ("datetime", "timedelta"): _Inert,
    ("numpy", "dtype"): _Inert,
    ("numpy", "ndarray"): _Inert,
    **{(f"numpy.{core}.multiarray", name): _Inert for core in ("core", "_core") for name in ("_reconstruct", "scalar")},
    **{("torch._utils", f"_rebuild_{name}"): _Inert for name in ("tensor_v2", "tensor_v3", "parameter")},
    **{("torch", name): _Inert for name in dir(torch) if name.endswith("Storage")},
    **{
        ("torch", str(dtype).removeprefix("torch.")): str(dtype)
        for dtype in vars(torch).values()
        if isinstance(dtype, torch.dtype)
    },
}
# Modules that hold enumerations and nothing else.
_ENUMERATIONS = ("megatron.core.enums", "megatron.core.transformer.enums")


class _CommonStateUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _ENUMERATIONS and "." not in name:
            return _Inert
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        return _Inert()


def read_common_state(directory: Path) -> dict[str, Any]:
    """The values that a checkpoint saves besides its tensors; ``args`` has Megatron-LM's arguments as attributes.

    Args:
        directory: one iteration's directory.

    Returns:
        The values by name; empty if the checkpoint has none.

    Raises:
        CheckpointError: it is damaged, or names anything outside the allow-list.
    """
    path = directory / COMMON
    if path.is_file():
        data = _read(path, 0, path.stat().st_size)
    else:
        stored = read_metadata(directory).storage_data.get(MetadataIndex(_IN_SHARDS))
        if stored is None or Path(str(stored.relative_path)).name != str(stored.relative_path):
            return {}
        path = directory / str(stored.relative_path)
        data = _read(path, int(stored.offset), int(stored.length))
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            (described,) = [item for item in archive.infolist() if item.filename.partition("/")[2] == "data.pkl"]
            if described.compress_type != zipfile.ZIP_STORED:  # torch compresses nothing; a bomb would
                raise ValueError("compressed")
            content = _CommonStateUnpickler(io.BytesIO(archive.read(described))).load()
    except pickle.UnpicklingError as error:
        raise CheckpointError(Problem(str(path), None, f"is refused: {error}. Do not load this checkpoint.")) from None
    except Exception as error:
        raise CheckpointError(Problem(str(path), None, f"is damaged ({type(error).__name__}).")) from None
    if isinstance(content, list) and len(content) == 1:
        (content,) = content
    return content if isinstance(content, dict) else {}


def _read(path: Path, offset: int, length: int) -> bytes:
    if not 0 <= length <= _LARGEST:
        raise CheckpointError(
            Problem(
                str(path), f"{length} bytes", "is too large for arguments and counters; do not load this checkpoint."
            )
        )
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)
    except OSError as error:
        raise CheckpointError(Problem(str(path), None, f"cannot be read ({error.strerror}).")) from None
