"""``mq data inspect --chat``: conversations of token files, with what carries loss."""

import argparse
import html
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from megatron_qwen.errors import ConfigError, DataError, Problem

if TYPE_CHECKING:
    from megatron_qwen.data.token_files.token_set import TokenSet
    from megatron_qwen.data.tokenizers.tokenizer import Tokenizer

_GREEN, _DIM, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
_OPEN, _CLOSE = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"
_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e21; background: #f6f7f9; margin: 0 }
main { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.note { color: #5a6068 }
.chat { background: #fff; border: 1px solid #dfe3e8; border-radius: 6px; padding: .8rem 1rem; margin: 1rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; color: #5a6068 }
.chat b { display: block; font-weight: 600; color: #1c1e21; margin-bottom: .4rem }
mark { background: #d9f0dd; color: #14401d; border-radius: 3px }
i { font-style: normal; font-size: .8em; color: #8a5a00; background: #fdf1dc; border-radius: 3px; padding: 0 .2em }
mark i { color: #14401d; background: #b5e0bd }
table { border-collapse: collapse } td { padding: .1rem .9rem .1rem 0 } td + td { text-align: right }
"""


@dataclass(frozen=True)
class _Chat:
    """A conversation.

    Args:
        number: of the document in its token file.
        tokens: its ids.
        mask: 1 where one carries loss.
    """

    number: int
    tokens: list[int]
    mask: list[float]


def main(options: argparse.Namespace) -> int:
    """Shows the first conversations, or with ``--random`` some from anywhere."""
    from megatron_qwen.data.token_files.token_set import TokenSet
    from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer

    _check(options)
    opened = {str(prefix): TokenSet(prefix) for prefix in options.prefix}
    without = [name for name, tokens in opened.items() if not any(file.has_mask for file in tokens.files)]
    if without:
        fix = "has no loss mask, so it was not prepared of conversations (mq data prepare --chat)."
        raise DataError([Problem(name, None, fix) for name in without])
    shown = {name: list(_chosen(tokens, options)) for name, tokens in opened.items()}
    if options.json:
        listed = {name: [{"tokens": one.tokens, "mask": one.mask} for one in chats] for name, chats in shown.items()}
        print(json.dumps(next(iter(listed.values())) if len(listed) == 1 else listed))
        return 0
    tokenizer = load_tokenizer(options.tokenizer)
    if options.html is not None:
        options.html.write_text(_page(opened, shown, tokenizer), encoding="utf-8")
        print(f"{sum(map(len, shown.values()))} conversations: {options.html}")
        return 0
    for name, chats in shown.items():
        for chat in chats:
            print(f"{name}, conversation {chat.number}: {_counts(chat)}")
            print(_coloured(chat, tokenizer) if sys.stdout.isatty() else _bracketed(chat, tokenizer))
            print()
    return 0


def _check(options: argparse.Namespace) -> None:
    problems = []
    if options.head < 1:
        problems.append(Problem("--head", options.head, "must be at least 1."))
    if options.tokenizer is None and not options.json:
        problems.append(Problem("--tokenizer", None, "is needed to show text (--json gives ids)."))
    if options.histogram is not None:
        problems.append(Problem("--histogram", options.histogram, "has no effect with --chat; omit one of them."))
    if options.html is not None and options.json:
        problems.append(Problem("--html", options.html, "and --json exclude each other."))
    if problems:
        raise ConfigError(problems)


def _chosen(tokens: "TokenSet", options: argparse.Namespace) -> Iterator[_Chat]:
    count = min(options.head, tokens.num_documents)
    numbers: Sequence[int] = range(count)
    if options.random is not None:
        numbers = sorted(random.Random(options.random).sample(range(tokens.num_documents), count))
    for number in numbers:
        start, stop = tokens.document_start(number), tokens.document_start(number + 1)
        mask = tokens.loss_mask(start, stop)
        assert mask is not None
        yield _Chat(
            number,
            [int(token) for token in tokens.tokens(start, stop)],
            [_weight(one, tokens.loss_unit) for one in mask],
        )


def _weight(value: int, unit: int) -> float:
    return int(value) if unit == 1 else int(value) / unit


def _counts(chat: _Chat) -> str:
    return f"{len(chat.tokens):,} tokens, {sum(weight > 0 for weight in chat.mask):,} with loss"


def _runs(chat: _Chat, tokenizer: "Tokenizer") -> Iterator[tuple[bool, str]]:
    """Whether it carries loss, and the text, of every run of tokens alike in that."""
    for trained, run in groupby(zip(chat.mask, chat.tokens, strict=True), key=lambda pair: bool(pair[0])):
        yield trained, tokenizer.written_out([token for _, token in run])


def _coloured(chat: _Chat, tokenizer: "Tokenizer") -> str:
    parts = (f"{_GREEN if trained else _DIM}{_harmless(text)}{_PLAIN}" for trained, text in _runs(chat, tokenizer))
    return "".join(parts)


def _bracketed(chat: _Chat, tokenizer: "Tokenizer") -> str:
    return "".join(f"{_OPEN}{text}{_CLOSE}" if trained else text for trained, text in _runs(chat, tokenizer))


def _harmless(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


def _page(opened: "Mapping[str, TokenSet]", shown: Mapping[str, Sequence[_Chat]], tokenizer: "Tokenizer") -> str:
    control = sorted(tokenizer.control_tokens, key=len, reverse=True)
    parts = [
        "<h1>Conversations</h1>",
        '<p class="note">What carries loss is <mark>marked</mark>; control tokens are <i>set apart</i>.</p>',
    ]
    for name, chats in shown.items():
        parts += [f"<h2>{html.escape(name)}</h2>", _table(opened[name])]
        for chat in chats:
            text = "".join(
                f"<mark>{_shown(run, control)}</mark>" if trained else _shown(run, control)
                for trained, run in _runs(chat, tokenizer)
            )
            parts.append(f'<div class="chat"><b>{chat.number:,}: {_counts(chat)}</b>{text}</div>')
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Conversations</title><style>{_CSS}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _table(tokens: "TokenSet") -> str:
    """What the manifest says."""
    from megatron_qwen.data.token_files.manifest import read_manifest

    rows: dict[str, Any] = {"conversations": tokens.num_documents, "tokens": tokens.num_tokens}
    noted = read_manifest(tokens.prefix)
    if noted is not None and noted.chat:
        rows["tokens with loss"] = noted.chat["trained_tokens"]
        rows["answers with loss"] = noted.chat["answers"]
        rows["tokens of the longest"] = noted.chat["longest"]
        rows |= {f"left out: {reason}": count for reason, count in noted.chat["reasons"].items()}
    body = "".join(f"<tr><td>{html.escape(name)}</td><td>{value:,}</td></tr>" for name, value in rows.items())
    return f"<table>{body}</table>"


def _shown(text: str, control: Sequence[str]) -> str:
    found = html.escape(text)
    for name in control:
        escaped = html.escape(name)
        found = found.replace(escaped, f"<i>{escaped}</i>")
    return found
