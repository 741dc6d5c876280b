"""No module imports, by whatever way, a module that imports it."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_house_rules import PACKAGES, SOURCES


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """Everything, also what a function imports when it is called and what only types need."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:  # a module of a package, or a name in a module
                yield from (f"{node.module}.{alias.name}", node.module)


def graph(sources: list[Path]) -> dict[str, set[str]]:
    """Modules of the project that each of them imports; a package itself holds nothing and is left out."""
    modules = {module_name(path): path for path in sources if path.name != "__init__.py"}
    return {name: modules.keys() & set(imported(path)) for name, path in modules.items()}


def test_no_import_leads_back():
    found = graph(SOURCES)
    assert {name.split(".")[0] for name in found} == set(PACKAGES)
    TopologicalSorter(found).prepare()  # raises CycleError with the modules of a cycle


def test_a_cycle_is_found():
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).prepare()
