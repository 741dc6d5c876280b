"""Links between documents as a git host follows them, to files and headings; and pictures that are drawn from text."""

import html
import re

import pytest

from tests.conftest import ROOT
from tests.test_house_rules import TEXTS

DOCUMENTS = [path for path in TEXTS if path.suffix == ".md"]


def anchors(text: str) -> set[str]:
    """Anchors that a git host gives the headings of a page: words in lower case, a hyphen for every space."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_anchors():
    assert anchors("# A: b, `c_d`\n```\n# no\n```\n## One H200, 4k\n") == {"a-b-c_d", "one-h200-4k"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(path):
    text = path.read_text()
    links = re.findall(r"\]\(([^()\s#]*)#?([^()\s]*)\)", text)
    links += re.findall(r"^\[[^\]]+\]: +([^\s#]+)#?(\S*)$", text, flags=re.MULTILINE)
    for link, anchor in links:
        if "://" not in link:
            there = path.parent / link if link else path
            assert there.exists(), link
            assert not anchor or anchor in anchors(there.read_text()), f"{link}#{anchor}"


@pytest.mark.parametrize("source", sorted((ROOT / "docs/images").glob("*.dot")), ids=lambda path: path.name)
def test_a_picture_has_the_words_of_its_source(source):
    """A change of a .dot file that was not drawn again."""
    words = [word.strip() for label in re.findall(r'label="(.*?)"', source.read_text()) for word in label.split("\\n")]
    drawn = re.findall(r"<text.*?>(.*?)</text>", source.with_suffix(".svg").read_text())
    assert sorted(words) == sorted(html.unescape(text).replace("\xa0", " ").strip() for text in drawn)
