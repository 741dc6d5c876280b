"""Answers of two processes, one plain and one prepared, shared by all tests of patches."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import made_once, run


@dataclass(frozen=True)
class Observed:
    """What one test file observed: with plain torch and megatron-core, and in a prepared process."""

    plain: Any
    prepared: Any


@pytest.fixture(scope="session")
def observations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By state of the process and test file."""

    def make(directory: Path) -> None:
        for state in ("plain", "prepared"):
            printed = run("tests.core_patches.observe", state, check=True).stdout
            (directory / state).write_text(printed.splitlines()[-1])

    directory = made_once(tmp_path_factory, "core_patches", make)
    return {state: json.loads((directory / state).read_text()) for state in ("plain", "prepared")}


@pytest.fixture
def observed(observations: dict[str, dict[str, Any]], request: pytest.FixtureRequest) -> Observed:
    """Of the test file that asks."""
    name = request.path.stem
    return Observed(observations["plain"][name], observations["prepared"][name])
