"""manifest.json of a released directory: what a release engineer signs, and what `verify` compares with."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from checkpoints_convert.safetensors_format import DTYPE_NAMES
from megatron_qwen.errors import ConversionError, Problem
from megatron_qwen.provenance import code_version

MANIFEST = "manifest.json"
_BUFFER = 1 << 22
_FORMATS = {name: name for name in DTYPE_NAMES}


@dataclass(frozen=True)
class NotedTensor:
    """What a manifest says of a tensor.

    Args:
        dtype: torch's name of its format.
        shape: its shape.
        xxh3_128: of its values.
        file: the file that holds it.
    """

    dtype: str
    shape: tuple[int, ...]
    xxh3_128: str
    file: str


def sha256(path: Path) -> str:
    """Of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_BUFFER):
            found.update(data)
    return found.hexdigest()


def identity_digest(identity: Mapping[str, Any]) -> str:
    """A short name of all that decides a conversion's bytes."""
    return xxhash.xxh3_128_hexdigest(json.dumps(identity, sort_keys=True).encode())


def write_manifest(
    directory: Path,
    *,
    files: Mapping[str, str],
    tensors: Mapping[str, NotedTensor],
    origin: Mapping[str, Any],
    identity: Mapping[str, Any],
) -> None:
    """Writes manifest.json, the last file of a directory.

    Args:
        directory: what is described.
        files: SHA-256 of the files that are known already; the others in the directory are read.
        tensors: by name.
        origin: where the weights come from: ``source``, ``data``, and the run's resolved ``configuration``.
        identity: all that decided the bytes.
    """
    names = sorted(released_files(directory))
    content = {
        "format": 1,
        "source": origin["source"],
        "data": origin["data"],
        "code": code_version(),
        "identity": identity_digest(identity),
        "files": {
            name: {"size": (directory / name).stat().st_size, "sha256": files.get(name) or sha256(directory / name)}
            for name in names
        },
        "tensors": {
            name: {"dtype": noted.dtype, "shape": list(noted.shape), "xxh3_128": noted.xxh3_128, "file": noted.file}
            for name, noted in sorted(tensors.items())
        },
        "configuration": origin["configuration"],
    }
    (directory / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def released_files(directory: Path) -> Iterable[str]:
    """Names of all files but the manifest and hidden ones."""
    for path in directory.iterdir():
        if path.is_file() and path.name != MANIFEST and not path.name.startswith("."):
            yield path.name


class ReleaseManifest:
    """A manifest.json, read.

    Args:
        path: the file.

    Raises:
        ConversionError: it is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = json.loads(path.read_bytes())
            self.identity = str(content["identity"])
            self.source: dict[str, Any] = dict(content["source"])
            self.configuration: dict[str, Any] = dict(content["configuration"])
            self.files = {
                str(name): (int(item["size"]), str(item["sha256"])) for name, item in content["files"].items()
            }
            self.tensors = {
                str(name): NotedTensor(
                    _FORMATS[item["dtype"]], tuple(map(int, item["shape"])), str(item["xxh3_128"]), str(item["file"])
                )
                for name, item in content["tensors"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ConversionError(Problem(str(path), None, "is no manifest of a conversion, or damaged.")) from None

    def damage(self, directory: Path) -> list[Problem]:
        """Files of a directory that are missing, more, or of other bytes than noted."""
        found = []
        for name, (size, digest) in self.files.items():
            path = directory / name
            if not path.is_file():
                found.append(Problem(str(path), None, "is missing."))
            elif path.stat().st_size != size:
                found.append(Problem(str(path), f"{path.stat().st_size} bytes", f"the manifest says {size}."))
            elif sha256(path) != digest:
                found.append(Problem(str(path), None, "has other bytes than the manifest says."))
        extra = sorted(set(released_files(directory)) - set(self.files))
        return found + [Problem(str(directory / name), None, "is not in the manifest.") for name in extra]


def is_complete(out: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a directory is the whole result of this very conversion; its files are read again.

    Raises:
        ConversionError: it is, and has been damaged since.
    """
    path = out / MANIFEST
    if not path.is_file():
        return False
    try:
        noted = ReleaseManifest(path)
    except ConversionError:
        return False
    if noted.identity != identity_digest(identity):
        return False
    if damage := noted.damage(out):
        raise ConversionError(damage)
    return True
