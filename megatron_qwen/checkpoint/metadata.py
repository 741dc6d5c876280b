"""Reads torch's checkpoint metadata with an unpickler that has an allow-list.

torch reads ``.metadata`` with plain pickle, so a crafted file runs any command. Every load here goes through
``read_metadata`` first; a file that names anything outside the allow-list is refused before torch sees it.
"""

import collections
import enum
import io
import pathlib
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint import planner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix

from megatron_qwen.core_patches import plain_objects
from megatron_qwen.errors import CheckpointError, Problem

_METADATA_CLASSES = (
    dcp.Metadata,
    dcp.MetadataIndex,
    dcp.TensorStorageMetadata,
    dcp.BytesStorageMetadata,
    dcp.ChunkStorageMetadata,
    dcp.TensorProperties,
    dcp._MEM_FORMAT_ENCODING,
    dcp.StorageMeta,
)
# megatron-core adds the plans of all ranks.
_PLAN_CLASSES = (planner.SavePlan, planner.WriteItem, planner.WriteItemType, planner.TensorWriteData)
_ALLOWED: dict[tuple[str, str], Any] = {
    **{("torch.distributed.checkpoint.metadata", kind.__name__): kind for kind in _METADATA_CLASSES},
    **{("torch.distributed.checkpoint.planner", kind.__name__): kind for kind in _PLAN_CLASSES},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"): _StoragePrefix,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): pathlib.PosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PosixPath,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "dict"): dict,
    ("builtins", "list"): list,
    ("builtins", "tuple"): tuple,
    **{
        ("torch", str(dtype).removeprefix("torch.")): dtype
        for dtype in vars(torch).values()
        if isinstance(dtype, torch.dtype)
    },
}


_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class whose attributes can be set


class FrozenType(type):
    """The type of classes that a pickle may name: their attributes cannot be set.

    A pickle may ask for a state to be set on whatever it names. On a class that would change the class for the
    whole process.
    """

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it changes the class {cls.__name__}")


class FrozenCall:
    """A function that a pickle may name, without attributes to set."""

    __slots__ = ("_function",)
    _function: Any

    def __init__(self, function: Any) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function."""
        return self._function(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


def _frozen(thing: Any) -> Any:
    if isinstance(thing, type) and thing.__flags__ & _HEAP_TYPE:
        return FrozenCall(thing) if issubclass(thing, enum.Enum) else FrozenType(thing.__name__, (thing,), {})
    return FrozenCall(thing) if callable(thing) and not isinstance(thing, type) else thing


_FROZEN = {name: _frozen(thing) for name, thing in _ALLOWED.items()}


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, data: bytes, allowed: dict[tuple[str, str], Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None


def read_metadata(directory: Path) -> dcp.Metadata:
    """The metadata of a torch_dist checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, or names anything that genuine metadata does not.
    """
    path = directory / ".metadata"
    try:
        data = path.read_bytes()
        _MetadataUnpickler(data, _FROZEN).load()
        content = _MetadataUnpickler(data, _ALLOWED).load()
        _require_well_formed(content)
    except FileNotFoundError:
        raise CheckpointError(Problem(str(path), None, "is missing: this is not a torch_dist checkpoint.")) from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(Problem(str(path), None, f"is refused: {error}. Do not load this checkpoint.")) from None
    except Exception as error:
        raise CheckpointError(Problem(str(path), None, f"is damaged ({type(error).__name__}).")) from None
    assert isinstance(content, dcp.Metadata)
    return content


def _require_well_formed(content: Any) -> None:
    """Raises TypeError where anything that is read later has another type than torch gives it."""
    if not isinstance(content, dcp.Metadata) or not isinstance(content.state_dict_metadata, dict):
        raise TypeError
    if not isinstance(content.storage_data, dict):
        raise TypeError
    for name, entry in content.state_dict_metadata.items():
        if isinstance(entry, dcp.BytesStorageMetadata) and isinstance(name, str):
            continue
        if not isinstance(entry, dcp.TensorStorageMetadata) or not isinstance(name, str):
            raise TypeError
        if not isinstance(entry.properties.dtype, torch.dtype) or not _are_sizes(entry.size):
            raise TypeError
        if not all(_are_sizes(chunk.offsets) and _are_sizes(chunk.sizes) for chunk in list(entry.chunks)):
            raise TypeError
    for index, stored in content.storage_data.items():
        if not isinstance(index, dcp.MetadataIndex) or not isinstance(stored, _StorageInfo):
            raise TypeError
        if not isinstance(stored.offset, int) or not isinstance(stored.length, int):
            raise TypeError


def _are_sizes(sizes: Any) -> bool:
    return isinstance(sizes, tuple | list) and all(isinstance(size, int) for size in sizes)


@contextmanager
def plain_objects_only() -> Iterator[None]:
    """Loads inside take tensors and plain containers only, and say so in an error of ours where a shard holds more.

    Besides tensors a shard holds pickled objects, which torch's planner reads without restriction: see
    core_patches/plain_objects.py.

    Raises:
        CheckpointError: a shard holds anything else.
    """

    plain_objects.apply()
    try:
        yield
    except CheckpointException as error:
        refused = [cause for _, (cause, _) in error.failures.items() if isinstance(cause, CheckpointError)]
        raise (refused[0] if refused else error) from None
