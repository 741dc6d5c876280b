"""``mq docs`` on a checkout of two pages: what it refuses, and what it leaves alone."""

import re

import pytest

from megatron_qwen.errors import ConfigError, UserError
from tests.conftest import ROOT, run
from tools.docs import build_site

NAV = "nav:\n  - Home: README.md\n  - Page: docs/page.md\n"
README = "# Home\n\n[a page](docs/page.md#there), [its code](tools/code.py), [picture][p]\n\n[p]: docs/images/a.png\n"


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    for name in ("docs/site", "docs/images", "tools"):
        (root / name).mkdir(parents=True)
    settings = (ROOT / "docs/site/mkdocs.yml").read_text()
    (root / "docs/site/mkdocs.yml").write_text(re.sub(r"^nav:\n.*?\n\n", f"{NAV}\n", settings, flags=re.M | re.S))
    for name in ("iframe-worker.js", "site.css"):
        (root / "docs/site" / name).write_text("")
    (root / "README.md").write_text(README)
    (root / "docs/page.md").write_text("# Page\n\n## There\n\n```\n[no link](nowhere.md)\n```\n")
    (root / "docs/images/a.png").write_bytes(b"png")
    (root / "tools/code.py").write_text('print("~~~~", __file__)\n')
    return root


def test_a_source_file_is_a_page(checkout, tmp_path):
    site = tmp_path / "site"
    build_site(site, root=checkout)
    assert 'href="tools/code.py.html' in (site / "index.html").read_text()
    page = (site / "tools/code.py.html").read_text()
    assert "~~~~" in page
    assert "[no link](nowhere.md)" in (site / "docs/page.html").read_text()
    assert (site / "docs/images/a.png").read_bytes() == b"png"
    assert not (site / "docs/site/mkdocs.yml").exists()


def test_a_link_to_a_directory_leads_to_its_readme(checkout, tmp_path):
    (checkout / "tools/README.md").write_text("# Tools\n")
    (checkout / "docs/page.md").write_text("# Page\n\n## There\n\n[tools](../tools)\n")
    settings = checkout / "docs/site/mkdocs.yml"
    settings.write_text(settings.read_text().replace(NAV, f"{NAV}  - Tools: tools/README.md\n"))
    build_site(tmp_path / "site", root=checkout)
    assert 'href="../tools/index.html"' in (tmp_path / "site/docs/page.html").read_text()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("README.md", "# Home\n\n[x](docs/none.md)\n", ["'README.md'", "'docs/none.md'"]),
        ("README.md", "# Home\n\n[x](docs/page.md#none)\n", ["'README.md'", "'docs/page.md#none'"]),
        ("README.md", "# Home\n\n[x](tools)\n", ["'README.md'", "'tools'"]),
        ("README.md", "# Home\n\n[x](../../outside.md)\n", ["'README.md'", "outside.md"]),
        ("docs/new.md", "# New\n", ["docs/new.md", "nav"]),
        ("docs/page.md", None, ["docs/page.md", "nav"]),
    ],
    ids=["page", "anchor", "directory", "outside", "not in the navigation", "only in the navigation"],
)
def test_what_leads_nowhere_is_named(name, text, said, checkout, tmp_path):
    (tmp_path / "outside.md").write_text("# Not of the checkout\n")
    if text is None:
        (checkout / "README.md").write_text("# Home\n")
        (checkout / name).unlink()
    else:
        (checkout / name).write_text(text)
    with pytest.raises(UserError) as refused:
        build_site(tmp_path / "site", root=checkout)
    assert refused.value.exit_code == 1
    for word in said:
        assert word in refused.value.render()
    assert not (tmp_path / "site").exists()


def test_a_site_stays_until_the_next_is_complete(checkout, tmp_path):
    site = tmp_path / "site"
    build_site(site, root=checkout)
    before = (site / "index.html").read_text()
    (checkout / "README.md").write_text("# Changed\n\n[a page](docs/none.md)\n")
    with pytest.raises(UserError):
        build_site(site, root=checkout)
    assert (site / "index.html").read_text() == before
    (checkout / "README.md").write_text("# Changed\n\n[a page](docs/page.md)\n")
    build_site(site, root=checkout)
    assert "Changed" in (site / "index.html").read_text()
    assert not (site / "tools").exists(), "nothing of the earlier site is left"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkout", "site"]


def test_what_is_no_site_is_left_alone(checkout, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "index.html").write_text("years of work")
    for output in (precious, precious / "index.html"):
        with pytest.raises(ConfigError, match="is no site of mq docs"):
            build_site(output, root=checkout)
    assert (precious / "index.html").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    build_site(tmp_path / "empty", root=checkout)
    assert (tmp_path / "empty" / "index.html").is_file()


def test_a_wrong_port(tmp_path):
    done = run("tools.docs", "--output", tmp_path / "site", "--serve", "99999")
    assert done.returncode == 2
    assert "--serve = 99999" in done.stderr
    assert "Traceback" not in done.stderr
