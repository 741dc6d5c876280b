"""A browser without a window, for pages that are to be opened: Debian's chromium, driven by playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megatron_qwen.errors import ConfigError, Problem

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
# Every chart of a report is drawn.
DRAWN = "document.querySelectorAll('.chart svg.marks').length === document.querySelectorAll('.chart').length"


def program() -> str | None:
    """The browser of this machine."""
    return next((path for name in _PROGRAMS if (path := shutil.which(name))), None)


@contextmanager
def running() -> Iterator["Browser"]:
    """A running browser.

    Raises:
        ConfigError: there is none.
    """
    path = program()
    if path is None:
        raise ConfigError(Problem("chromium", None, "is not installed: apt-get install chromium."))
    from playwright.sync_api import sync_playwright

    # Without a sandbox it also runs as root; it opens pages of ours alone.
    options: dict[str, Any] = {"executable_path": path, "args": ["--no-sandbox"]}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**options)
        try:
            yield browser
        finally:
            browser.close()
