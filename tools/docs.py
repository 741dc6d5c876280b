"""``mq docs``: builds the documents as one static site with search, which needs no network and no server."""

import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_qwen.cli import Parser, run_program
from megatron_qwen.errors import ConfigError, Problem, UserError
from megatron_qwen.files import publish, temporary_name
from tools.docs_tree import write_tree

if TYPE_CHECKING:
    from http.server import ThreadingHTTPServer

_ROOT = Path(__file__).resolve().parent.parent
# Says that a directory may be replaced by the next build.
_MARKER = ".mq-docs"
_DEFAULT_PORT = 8000


class _Collector(logging.Handler):
    """Keeps the warnings of mkdocs: what its strict mode only counts."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a message."""
        self.messages.append(record.getMessage())


def build_site(output: Path, *, root: Path = _ROOT) -> None:
    """Builds the site; it takes the place of an earlier one when it is complete.

    Args:
        output: a directory that is absent, empty, or an earlier site.
        root: the checkout.

    Raises:
        ConfigError: the directory holds something else.
        UserError: with every link, anchor and entry of the navigation that leads nowhere. An earlier site stays.
    """
    if output.exists() and not (output.is_dir() and (_is_site(output) or not any(output.iterdir()))):
        raise ConfigError(Problem("--output", output, "exists and is no site of mq docs; choose another directory."))
    output.parent.mkdir(parents=True, exist_ok=True)
    site = temporary_name(output)
    try:
        with tempfile.TemporaryDirectory() as pages:
            write_tree(root, Path(pages))
            _render(root / "docs" / "site" / "mkdocs.yml", pages=Path(pages), site=site)
        (site / _MARKER).touch()
        if output.exists():
            shutil.rmtree(output)
        publish(site, output)
    finally:
        shutil.rmtree(site, ignore_errors=True)


def _is_site(directory: Path) -> bool:
    return (directory / _MARKER).is_file()


def _render(settings: Path, *, pages: Path, site: Path) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import MkDocsException

    with _collected() as messages:
        try:
            config = load_config(str(settings), docs_dir=str(pages), site_dir=str(site))
            config.plugins.on_startup(command="build", dirty=False)
            build(config)
            config.plugins.on_shutdown()
        except MkDocsException as error:
            messages.append(str(error))
    if messages:
        raise UserError("the site was not built.\n" + "\n".join(f"  {message}" for message in messages))


@contextmanager
def _collected() -> Iterator[list[str]]:
    log, collector = logging.getLogger("mkdocs"), _Collector()
    log.addHandler(collector)
    try:
        yield collector.messages
    finally:
        log.removeHandler(collector)


def server_of(directory: Path, port: int) -> "ThreadingHTTPServer":
    """A server of a directory to this machine, which listens already.

    Args:
        directory: the site; it may be made later.
        port: 0 is any free one.

    Raises:
        ConfigError: the port cannot be used.
    """
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """Says nothing of a browser that left before it had the whole page."""
            if not isinstance(sys.exception(), ConnectionError):
                super().handle_error(request, client_address)  # type: ignore[arg-type]

    try:
        return Server(("127.0.0.1", port), partial(SimpleHTTPRequestHandler, directory=str(directory)))
    except (OSError, OverflowError) as error:
        raise ConfigError(Problem("--serve", port, f"cannot be used ({error}); choose another port.")) from None


def main(arguments: Sequence[str]) -> int:
    """Builds the site, says where it is, and serves it if asked to."""
    parser = Parser(
        "mq docs",
        description="Builds README.md, docs/ and what they link to as one static site with search. It needs no "
        "network: open its index.html in a browser. A link that leads nowhere is an error (exit 1).",
        examples=["mq docs", "mq docs --output /var/www/megatron_qwen", "mq docs --serve", "mq docs --serve 8123"],
    )
    output_help = "directory of the site; default: build/docs in the checkout"
    parser.add_argument("--output", type=Path, default=_ROOT / "build" / "docs", help=output_help)
    parser.add_argument(
        "--serve",
        type=int,
        nargs="?",
        const=_DEFAULT_PORT,
        metavar="PORT",
        help="then serve it to this machine until Ctrl-C, at this port (%(const)s)",
    )
    options = parser.parse_args(arguments)
    output: Path = options.output.absolute()
    server = None if options.serve is None else server_of(output, options.serve)
    build_site(output)
    print(output / "index.html", flush=True)
    if server is not None:
        with server, suppress(KeyboardInterrupt):
            print(f"http://127.0.0.1:{server.server_port}/ until Ctrl-C", flush=True)
            server.serve_forever()
    return 0


if __name__ == "__main__":
    run_program(main)
