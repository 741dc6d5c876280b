"""Reads torch's checkpoint metadata with an unpickler that knows what may be in it.

torch reads ``.metadata`` with plain pickle, so a crafted file runs any command. Every load here goes through
``read_metadata`` first; a file that names anything outside the allow-list is refused before torch sees it.
"""

import collections
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
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix

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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None


def read_metadata(directory: Path) -> dcp.Metadata:
    """The metadata of a torch_dist checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, or names anything that genuine metadata does not.
    """
    path = directory / ".metadata"
    try:
        content = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise CheckpointError(Problem(str(path), None, "is missing: this is no torch_dist checkpoint.")) from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(Problem(str(path), None, f"is refused: {error}. Do not load this checkpoint.")) from None
    except Exception as error:
        raise CheckpointError(Problem(str(path), None, f"is damaged ({type(error).__name__}).")) from None
    if not isinstance(content, dcp.Metadata):
        raise CheckpointError(Problem(str(path), None, "is no checkpoint metadata."))
    return content


@contextmanager
def plain_objects_only() -> Iterator[None]:
    """Inside, torch's checkpoint loader takes tensors and plain containers, whatever a shard holds.

    Beside tensors a shard holds pickled objects, which torch's planner reads without restriction.

    Raises:
        CheckpointError: a shard holds anything else.
    """

    def load_bytes(planner_: Any, item: Any, value: io.BytesIO) -> None:
        name = item.dest_index.fqn
        try:
            content = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            why = str(error).splitlines()[0]
            raise CheckpointError(Problem(name, None, f"is refused: {why} Do not load this checkpoint.")) from None
        plain = io.BytesIO()
        torch.save(content, plain)
        plain.seek(0)
        unrestricted(planner_, item, plain)

    loader: Any = DefaultLoadPlanner
    unrestricted = loader.load_bytes
    loader.load_bytes = load_bytes
    try:
        yield
    except CheckpointException as error:
        refused = [cause for _, (cause, _) in error.failures.items() if isinstance(cause, CheckpointError)]
        raise (refused[0] if refused else error) from None
    finally:
        loader.load_bytes = unrestricted
