"""docs/configuration.md is what the dataclasses say."""

from megatron_qwen.config.render import reference_page
from megatron_qwen.config.run import all_fields
from tests.conftest import ROOT


def test_the_page_is_up_to_date():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == reference_page(), "run: ./mq config reference > docs/configuration.md"


def test_it_names_every_field():
    page = reference_page()
    assert all(f"`{path}`" in page for path in all_fields())
