"""The site of ``mq docs``: every link and anchor leads somewhere, the search finds, and nothing asks for a network."""

import json
import re
import signal
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

import pytest

from tests.conftest import ROOT, command, environment

# Of the attributes that name a resource, those that a browser loads with the page.
LOADED = {"src", "srcset", "poster", "data"}
# What a link element names without loading it.
NOT_LOADED = {"canonical", "next", "prev", "alternate"}


@dataclass
class Page(HTMLParser):
    """What a page has and asks for.

    Args:
        path: of the file.
        ids: targets of anchors.
        links: what a reader can follow.
        loads: what a browser loads.
    """

    path: Path
    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        text = self.path.read_text()
        self.feed(text)
        for style in re.findall(r"<style.*?</style>", text, flags=re.DOTALL):
            self.loads += loads_of_css(style)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids.add(values.get("id", ""))
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and values.get("rel") not in NOT_LOADED:
            self.loads.append(values["href"])
        self.loads += [values[name] for name in LOADED & values.keys()]


def loads_of_css(text: str) -> list[str]:
    return re.findall(r"(?:url\(|@import\s)\s*[\"']?([^\"')\s]+)", text)


def target(site: Path, page: Path, link: str) -> Path:
    """The file that a relative link leads to; the page of errors has absolute ones."""
    path = unquote(urlsplit(link).path)
    return site / path.lstrip("/") if path.startswith("/") else (page.parent / path).resolve() if path else page


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The site, and the address at which the command serves it until it is interrupted."""
    output = tmp_path_factory.mktemp("built") / "site"
    words = command("tools.docs", "--output", output, "--serve", 0)
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/"
    )
    first, second = process.stdout.readline(), process.stdout.readline()
    assert first == f"{output}/index.html\n", process.communicate()
    yield output, re.fullmatch(r"(http://127\.0\.0\.1:\d+/) until Ctrl-C\n", second)[1]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


@pytest.fixture(scope="module")
def site(served):
    return served[0]


@pytest.fixture(scope="module")
def pages(site):
    """By path, without the report of a study: a document of its own that pages link to."""
    paths = [path for path in site.rglob("*.html") if "studies" not in path.parts]
    return {path: Page(path) for path in paths}


def test_every_document_is_a_page(site, pages):
    documents = {path.relative_to(ROOT).with_suffix(".html") for path in (ROOT / "docs").glob("*.md")}
    assert {site / name for name in documents} | {site / "index.html"} <= pages.keys()
    assert "<h1" in (site / "index.html").read_text()


def test_links_and_anchors_lead_somewhere(site, pages):
    broken, followed = [], 0
    for path, page in pages.items():
        for link in page.links:
            if urlsplit(link).scheme:
                continue
            followed += 1
            there, anchor = target(site, path, link), urlsplit(link).fragment
            if not there.is_file() or (anchor and there in pages and anchor not in pages[there].ids):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken
    assert followed > 800


def test_nothing_is_loaded_from_elsewhere(site, pages):
    loads = [(path, url) for path, page in pages.items() for url in page.loads]
    loads += [(path, url) for path in site.rglob("*.css") for url in loads_of_css(path.read_text())]
    assert len(loads) > 100
    for path, url in loads:
        if not url.startswith(("data:", "#")):
            assert not urlsplit(url).scheme, f"{path.relative_to(site)} loads {url}"
            assert not urlsplit(url).netloc, f"{path.relative_to(site)} loads {url}"
            assert target(site, path, url).is_file(), f"{path.relative_to(site)} loads {url}"


def test_markdown_that_only_a_git_host_understands(pages):
    """A list without an empty line before it, or a diagram that the theme would draw with a script of a CDN."""
    for path in pages:
        text = path.read_text()
        assert "mermaid" not in text, path
        for paragraph in re.findall(r"<p>(.*?)</p>", text, flags=re.DOTALL):
            assert not re.search(r"^\s*([-*|]|\d+\.) ", paragraph, flags=re.MULTILINE), f"{path}: {paragraph}"


def test_what_belongs_to_an_item_is_indented_by_four():
    """Three are enough for a git host; in the site the item ends there, and the next one is number 1."""
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "slurm").rglob("*.md")]:
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        found = re.search(r"\n\n {1,3}\S.*", text)
        assert found is None, f"{path}: {found[0]}"


def test_the_search_knows_the_documents(site):
    index = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    found = {entry["location"].split("#")[0] for entry in index if "Tijdeman" in entry["text"]}
    assert found == {"docs/data.html"}
    assert not [entry for entry in index if entry["location"].startswith("tools/")], "source files are no documents"


def test_it_is_served(served):
    with urlopen(served[1] + "docs/data.html", timeout=10) as answer:
        assert b"Tijdeman" in answer.read()


@pytest.mark.parametrize("how", ["file", "http"])
@pytest.mark.parametrize("name", ["index.html", "docs/architecture.html"])
def test_in_a_browser(name, how, served, chromium, tmp_path):
    """A page and its search, as a file and from a server: all requests are to the site."""
    site, address = served
    home = address if how == "http" else f"{site.as_uri()}/"
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    tab, asked, said = context.new_page(), [], []
    context.route("**/*", lambda route: (asked.append(route.request.url), route.continue_()))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(home + name)
    assert tab.locator("h1").is_visible()
    assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    tab.screenshot(path=tmp_path / "page.png")
    tab.locator(".md-search__input").press_sequentially("Tijdeman")  # the theme listens to keys
    tab.locator(".md-search-result__link[href*='docs/data.html']").first.wait_for()  # results change with every key
    tab.set_viewport_size({"width": 360, "height": 800})
    tab.goto(home + name)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360, "it scrolls sideways on a phone"
    context.close()
    assert said == []
    assert asked
    assert all(url.startswith((home, "data:", "about:blank")) for url in asked), asked
