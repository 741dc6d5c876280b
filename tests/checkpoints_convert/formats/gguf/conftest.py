"""Models as Hugging Face directories, made once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints_convert.compare.sides import Side, open_side
from tests.checkpoints_convert.formats.gguf.models import make


@pytest.fixture(scope="session")
def side(tmp_path_factory) -> Callable[[str], Side]:
    made: dict[str, Path] = {}

    def of(name: str) -> Side:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp("model") / "hf")
        return open_side(made[name])

    return of
