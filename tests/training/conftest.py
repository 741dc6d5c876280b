"""One start for all tests of a step: a text that is known to the last token, and weights that are loud everywhere."""

from pathlib import Path

import pytest

from megatron_qwen.recipes.registry import RECIPES
from tests.training.ranks import save_loud_start
from tests.training.reference import Documents, write_documents


@pytest.fixture(scope="session")
def documents(tmp_path_factory) -> Documents:
    """Every token carries loss."""
    return write_documents(tmp_path_factory.mktemp("documents"), masked=False)


@pytest.fixture(scope="session")
def masked_documents(tmp_path_factory) -> Documents:
    """The same with a .mask: documents differ in the share of their tokens that carries loss."""
    return write_documents(tmp_path_factory.mktemp("masked"), masked=True)


@pytest.fixture(scope="session")
def starts(pool, documents, tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of iteration 0, by recipe."""
    found = {}
    for recipe in ("tiny_dense", "tiny_moe"):
        found[recipe] = tmp_path_factory.mktemp(recipe) / "checkpoints"
        config = RECIPES[recipe]().with_section("data", path=str(documents.prefix))
        pool[1].run(save_loud_start, config, found[recipe])
    return found
