"""Formats of input files, as their names tell them."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePath


class FileFormat(StrEnum):
    """How documents are stored in a file."""

    JSONL = "JSON lines"
    TXT = "text"
    PARQUET = "Parquet"


class Compression(StrEnum):
    """How a file is compressed."""

    PLAIN = "plain"
    GZIP = "gzip"
    ZSTD = "zstd"
    BZIP2 = "bzip2"
    XZ = "xz"


@dataclass(frozen=True)
class InputFile:
    """A file of documents.

    Args:
        path: of the file.
        format: how documents are stored in it.
        compression: how it is compressed.
        size: bytes on disk.
    """

    path: Path
    format: FileFormat
    compression: Compression
    size: int


# Corpora are published under all of these: C4 and RedPajama as .json.gz, The Pile as .jsonl.zst, others as .ndjson.
FORMAT_ENDINGS = {
    ".jsonl": FileFormat.JSONL,
    ".ndjson": FileFormat.JSONL,
    ".json": FileFormat.JSONL,
    ".txt": FileFormat.TXT,
    ".parquet": FileFormat.PARQUET,
}
COMPRESSION_ENDINGS = {
    ".gz": Compression.GZIP,
    ".gzip": Compression.GZIP,
    ".zst": Compression.ZSTD,
    ".zstd": Compression.ZSTD,
    ".bz2": Compression.BZIP2,
    ".xz": Compression.XZ,
}
KNOWN_ENDINGS = f"{', '.join(FORMAT_ENDINGS)}, plain or with {', '.join(COMPRESSION_ENDINGS)} after it"
# Text that lies beside data and is about it. A name counts whole, without its endings and in any case.
_ABOUT_DATA = frozenset(
    (
        *("authors", "changelog", "changes", "checksums", "citation", "contributing", "contributors", "copying"),
        *("credits", "files", "index", "licence", "license", "manifest", "md5sum", "md5sums", "notice", "readme"),
        *("requirements", "robots", "sha256sum", "sha256sums", "urls", "version"),
    )
)
_REJECTED = ".skipped"  # PREFIX.skipped.jsonl holds the records that an earlier preparation rejected


def format_of(path: PurePath) -> tuple[FileFormat, Compression] | None:
    """The format that a file's name says; None if it says none that can be read."""
    ending = path.suffix.lower()
    compression = COMPRESSION_ENDINGS.get(ending, Compression.PLAIN)
    if compression is not Compression.PLAIN:
        ending = PurePath(path.stem).suffix.lower()
    form = FORMAT_ENDINGS.get(ending)
    if form is None or (form is FileFormat.PARQUET and compression is not Compression.PLAIN):
        return None
    return form, compression


def why_no_data(path: PurePath) -> str | None:
    """Why a file of a known format below a folder is not part of its data, by its name; None if it is."""
    stem = path.name.lower().split(".")[0]
    if stem in _ABOUT_DATA and (kind := format_of(path)) is not None and kind[0] is FileFormat.TXT:
        return "about the data, by its name"
    if _REJECTED in [suffix.lower() for suffix in path.suffixes]:
        return "rejected records of an earlier preparation"
    return None


def may_be_one_value(path: PurePath) -> bool:
    """Whether a file's ending, ``.json``, is that of JSON lines and of a single JSON value alike."""
    compressed = path.suffix.lower() in COMPRESSION_ENDINGS
    return PurePath(path.stem if compressed else path.name).suffix.lower() == ".json"
