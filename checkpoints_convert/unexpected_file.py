"""What a file is that should be something else: a download that did not happen is not a damaged file."""

from pathlib import Path

_FIRST = 512
_LFS = b"version https://git-lfs.github.com/spec/"


def what_it_is(path: Path) -> str | None:
    """What lies in the place of weights or JSON, and what to do; None where the first bytes do not tell."""
    try:
        with path.open("rb") as file:
            first = file.read(_FIRST)
    except OSError:
        return None
    if first.startswith(_LFS):
        return (
            "is a git-lfs pointer, which stands for the file: the clone was made without git-lfs; run `git lfs pull`."
        )
    if first.lstrip()[:9].lower() in (b"<!doctype", b"<html>") or first.lstrip()[:5].lower() == b"<html":
        return "is a page of HTML: the download was answered with an error or a login page; download it again."
    if first and not first.strip(b"\0"):
        return "begins with zeros: the download reserved the room and did not fill it; download it again."
    return None
