"""The Python packages that a run's code can import: their versions and a digest of their files. Imports none of them.

python -P -m megatron_qwen.packages    prints those of this interpreter as JSON
"""

import csv
import hashlib
import json
import platform
import re
import site
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Extras of pyproject.toml that no rank imports: `mq test` and `mq docs` install them into the environment of running
# jobs, which changes nothing for these.
_NOT_OF_RUNS = ("docs", "test", "dev")
# What this project or megatron-core uses where it is there. Only of these a new one changes what a run computes.
_USED_WHERE_PRESENT = ("transformer-engine", "apex", "deep-ep", "flash-attn", "nv-grouped-gemm", "triton")
# They are asked for through extras of torch and of Transformer Engine, so all that are there count.
_LIBRARIES = ("nvidia-", "cuda-", *_USED_WHERE_PRESENT)
# They watch or convert, and no rank computes with them.
_NOT_COMPUTED_WITH = ("nvidia-ml-py", "nvidia-modelopt", "nvidia-nsight")
_SELF = "megatron-qwen"  # its code is in the run's snapshot
_PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")
_INCOMPLETE = "incomplete"


@dataclass(frozen=True)
class Package:
    """An installed package.

    Args:
        version: as its metadata say; ``incomplete`` where the list of its files is missing, as during an installation.
        files: digest of the names and hashes of its files; empty where it does not list them. It differs between two
            builds of one version.
    """

    version: str
    files: str


@dataclass(frozen=True)
class PythonEnvironment:
    """What an interpreter would import.

    Args:
        interpreter: its path.
        python: its version.
        packages: by name, lower case with ``-``.
    """

    interpreter: str
    python: str
    packages: Mapping[str, Package]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "PythonEnvironment":
        """What ``as_dict`` gave.

        Raises:
            ValueError: it is something else.
        """
        try:
            packages = {str(name): Package(**one) for name, one in content["packages"].items()}
            return cls(str(content["interpreter"]), str(content["python"]), packages)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no environment: {error!r}") from None

    def versions(self) -> dict[str, str]:
        """The lock: versions by name."""
        return {name: package.version for name, package in sorted(self.packages.items())}


def differences(before: PythonEnvironment, now: PythonEnvironment) -> list[str]:
    """What an environment has otherwise than another one, an entry a package; their place does not matter.

    A new package is a difference only if a run would use it without being told to.
    """
    found = [] if before.python == now.python else [f"Python {before.python} -> {now.python}"]
    for name in sorted({*before.packages, *now.packages}):
        old, new = before.packages.get(name), now.packages.get(name)
        if old is None and not name.startswith(_USED_WHERE_PRESENT):
            continue
        if old is None or new is None:
            found.append(f"{name} {old.version if old else 'absent'} -> {new.version if new else 'absent'}")
        elif old.version != new.version:
            found.append(f"{name} {old.version} -> {new.version}")
        elif old.files != new.files:
            found.append(f"{name} {old.version}: other files under the same version")
    return found


def installed(folders: Sequence[str] | None = None, *, also: Iterable[str] = ()) -> PythonEnvironment:
    """The packages that this interpreter would import for the code of a run.

    Args:
        folders: where packages are installed, the first that has one counts; None: those of the interpreter. They
            are not taken from the search path of this process: programs add folders of their own to it (setuptools
            those of the packages that it brings).
        also: names that count too, where they are installed: those that were recorded for a run of other code, which
            may ask for other packages than this code does.
    """
    there: dict[str, Path] = {}
    for folder in _site_packages() if folders is None else folders:
        for name, path in _metadata_in(Path(folder)):
            there.setdefault(name, path)
    packages = {name: _package(there[name]) for name in sorted(_of_runs(there) | there.keys() & {*also})}
    return PythonEnvironment(sys.executable, platform.python_version(), packages)


def _site_packages() -> list[str]:
    own = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    return [*own, *site.getsitepackages()]


def _metadata_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and metadata directory of each package; what pip has set aside (``~name``) is none."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix in (".dist-info", ".egg-info") and _NAME.fullmatch(path.stem):
            yield _canonical(path.stem.partition("-")[0]), path


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _of_runs(there: Mapping[str, Path]) -> set[str]:
    """Installed packages that the project asks for, and what these ask for."""
    if not _PROJECT.is_file():  # the library alone was copied: nothing says what it needs
        return set(there) - {_SELF}
    libraries = [name for name in there if name.startswith(_LIBRARIES) and not name.startswith(_NOT_COMPUTED_WITH)]
    wanted, found = [*_project_needs(), *libraries], set[str]()
    while wanted:
        name = _canonical(wanted.pop())
        if name in there and name not in found and name != _SELF:
            found.add(name)
            wanted += _needs(there[name])
    return found


def _project_needs() -> Iterator[str]:
    """Packages that pyproject.toml of this code names for runs."""
    project = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {})
    of_runs = [line for name in extras if name not in _NOT_OF_RUNS for line in extras[name]]
    for line in [*project["dependencies"], *of_runs]:
        yield from _NAME.findall(line)[:1]


def _needs(metadata: Path) -> Iterator[str]:
    """Names of what a package asks for, on any platform; what belongs to one of its extras is left out."""
    path = metadata / "METADATA"
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                return  # the description follows
            name, _, need = line.partition(":")
            if name.lower() == "requires-dist" and not _EXTRA.search(need):
                yield from _NAME.findall(need)[:1]


def _package(metadata: Path) -> Package:
    version = metadata.stem.partition("-")[2] or "unknown"
    record = metadata / "RECORD"
    if metadata.suffix == ".egg-info":
        return Package(version, "")
    try:
        text = record.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return Package(_INCOMPLETE, "")  # pip writes it last
    # Without scripts, whose first line names the environment, and without what pip or uv notes about the installation.
    kept = sorted(
        f"{row[0]} {row[1]}"
        for row in csv.reader(text.splitlines())
        if len(row) > 1
        and row[1]
        and not row[0].startswith(("../", "/"))
        and not row[0].startswith(f"{metadata.name}/")
    )
    return Package(version, hashlib.sha256("\n".join(kept).encode()).hexdigest()[:16])


if __name__ == "__main__":
    print(json.dumps(installed().as_dict(), indent=2))
