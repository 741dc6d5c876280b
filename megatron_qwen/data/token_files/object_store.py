"""Token files in an object store: the index is downloaded once, tokens are read by byte ranges (multi-storage-client).

A URL is ``s3://bucket/prefix``, ``gs://...`` or ``msc://profile/prefix``; the library's own configuration
(MSC_CONFIG) defines how to reach a store. Indices and manifests are cached in MQ_DATA_CACHE, by default
~/.cache/megatron_qwen/data.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_qwen.errors import DataError, Problem
from megatron_qwen.files import atomic_path

CACHE_VARIABLE = "MQ_DATA_CACHE"


def is_url(path: str | Path) -> bool:
    """Whether a prefix is in an object store."""
    return "://" in str(path)


class StoredArray:
    """A file of numbers in a store; a slice of it is one range request.

    Args:
        url: of the file.
        dtype: of its numbers.

    Raises:
        DataError: there is no such file, or the library is not installed.
    """

    def __init__(self, url: str, dtype: np.dtype[Any]) -> None:
        self.url, self.dtype = url, dtype
        self._client, self._path = _resolve(url)
        self.size = _info(self._client, self._path, url).content_length

    def __getitem__(self, where: slice) -> npt.NDArray[Any]:
        """Numbers start .. stop - 1."""
        from multistorageclient.types import Range

        width = self.dtype.itemsize
        start, stop, _ = where.indices(self.size // width)
        if stop <= start:
            return np.zeros(0, dtype=self.dtype)
        wanted = (stop - start) * width
        try:
            data = self._client.read(self._path, byte_range=Range(start * width, wanted))
        except Exception as error:  # whatever the store's own library raises
            fix = f"cannot be read at byte {start * width} ({_said(error)})."
            raise DataError(Problem(self.url, None, fix)) from None
        if len(data) != wanted:
            fix = f"gave {len(data)} of {wanted} bytes at byte {start * width}: it is shorter than its index says."
            raise DataError(Problem(self.url, None, fix))
        return np.frombuffer(data, dtype=self.dtype)


def fetch_small_files(prefix: str, endings: tuple[str, ...]) -> Path:
    """Downloads small files of a prefix, unless they are in the cache already.

    Args:
        prefix: URL without ending.
        endings: of the files; one that the store does not have is left out.

    Returns:
        The local prefix.
    """
    root = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "megatron_qwen" / "data")
    versions = {}
    for ending in endings:
        client, path = _resolve(prefix + ending)
        if client.is_file(path):
            info = _info(client, path, prefix + ending)
            versions[ending] = [info.content_length, str(info.etag), str(info.last_modified)]
    key = hashlib.sha256(repr((prefix, sorted(versions.items()))).encode()).hexdigest()[:24]
    local = root / key / prefix.rsplit("/", 1)[-1]
    local.parent.mkdir(parents=True, exist_ok=True)
    for ending in versions:
        target = local.with_name(local.name + ending)
        if not target.is_file():
            client, path = _resolve(prefix + ending)
            with atomic_path(target) as temporary:  # many ranks of a node may do this at once
                client.download_file(path, str(temporary))
    return local


def _resolve(url: str) -> tuple[Any, str]:
    try:
        import multistorageclient
    except ImportError:
        fix = "needs multi-storage-client: pip install 'megatron_qwen[object-store]'."
        raise DataError(Problem(url, None, fix)) from None
    try:
        client, path = multistorageclient.resolve_storage_client(url)
    except Exception as error:
        fix = f"cannot be reached ({_said(error)}); MSC_CONFIG must name a file that defines the store."
        raise DataError(Problem(url, None, fix)) from None
    return client, path


def _info(client: Any, path: str, url: str) -> Any:
    try:
        return client.info(path)
    except FileNotFoundError:
        raise DataError(Problem(url, None, "no such file in the store.")) from None


def _said(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
