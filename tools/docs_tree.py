"""The pages of ``mq docs``: the documents of the checkout, and every file of it that one of them links to."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

# [text](target#anchor) and, at the beginning of a line, [name]: target
_LINK = re.compile(r"(?P<before>\]\(|^\[[^\]]+\]: +)(?P<target>[^()\s#]+)")
_DOCUMENTS = ("*.md", "docs/*.md", "slurm/**/*.md", "docs/site/*.css", "docs/site/*.js")
# Source files are shown as pages, because a browser would download most of them. Other files are copied.
_LANGUAGES = {".json": "json", ".py": "python", ".sbatch": "bash", ".sh": "bash", ".yaml": "yaml"}


def write_tree(root: Path, target: Path) -> None:
    """Writes the pages and all that they link to, each under its own path, so that relative links hold.

    A source file ``a/b.py`` becomes the page ``a/b.py.md``, and links to it are changed. A link that leads to no file
    of the checkout stays as it is: mkdocs names the page and the link.

    Args:
        root: the checkout.
        target: an empty directory.
    """
    root = root.resolve()
    waiting = [path for pattern in _DOCUMENTS for path in root.glob(pattern)]
    written: set[Path] = set()
    while waiting:
        source = waiting.pop()
        if source in written:
            continue
        written.add(source)
        name = source.relative_to(root)
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            text, linked = _page(source, root)
            copy.write_text(text, encoding="utf-8")
            waiting += linked
        elif source.suffix in _LANGUAGES:
            copy.with_name(f"{name.name}.md").write_text(_source_page(source, name), encoding="utf-8")
        else:
            shutil.copyfile(source, copy)


def _page(path: Path, root: Path) -> tuple[str, list[Path]]:
    """A page's text with links to the pages of source files, and the files of the checkout that it links to."""
    linked: list[Path] = []

    def changed(link: str) -> str:
        file = (path.parent / link).resolve()
        if (file / "README.md").is_file():  # of a directory a git host shows that
            link, file = f"{link}/README.md", file / "README.md"
        if not file.is_file() or not file.is_relative_to(root):
            return link
        linked.append(file)
        return f"{link}.md" if file.suffix in _LANGUAGES else link

    return _with_links(path.read_text(encoding="utf-8"), changed), linked


def _with_links(text: str, change: Callable[[str], str]) -> str:
    lines, code = [], False
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith("```"):
            code = not code
        lines.append(line if code else _LINK.sub(lambda found: found["before"] + change(found["target"]), line))
    return "".join(lines)


def _source_page(path: Path, name: Path) -> str:
    # Eight tildes: a source file may itself contain a fence of Markdown. The search is for documents.
    fence = "~" * 8
    text = path.read_text(encoding="utf-8")
    return f"---\nsearch:\n  exclude: true\n---\n# `{name}`\n\n{fence} {_LANGUAGES[path.suffix]}\n{text}\n{fence}\n"
