"""``mq data inspect``: what is in token files, in numbers, samples and a picture."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_qwen.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megatron_qwen.data.token_files.statistics import LengthStatistics
    from megatron_qwen.data.token_files.token_set import TokenSet

_FIRST_TOKENS = 32
_SHOWN_CHARACTERS = 400


def main(options: argparse.Namespace) -> int:
    """Shows every prefix; several of them side by side."""
    if options.chat:
        from tools.data.inspect_chat import main as show_chats

        return show_chats(options)
    given = {"--head": options.head != 3, "--random": options.random is not None, "--html": options.html is not None}
    if wrong := [Problem(name, None, "needs --chat.") for name, there in given.items() if there]:
        raise ConfigError(wrong)
    if options.histogram is not None and options.histogram.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(Problem("--histogram", options.histogram, "must end in .png or .svg."))
    from megatron_qwen.data.token_files.statistics import lengths
    from megatron_qwen.data.token_files.token_set import TokenSet

    opened = {str(prefix): TokenSet(prefix) for prefix in options.prefix}
    measured = {name: lengths(tokens) for name, tokens in opened.items()}
    facts = {name: _facts(tokens, measured[name], options) for name, tokens in opened.items()}
    if options.histogram is not None:
        _draw(measured, options.histogram)
    if options.json:
        print(json.dumps(next(iter(facts.values())) if len(facts) == 1 else facts, indent=2))
    else:
        for name, body in facts.items():
            print(name)
            _show(body)
    if options.histogram is not None and not options.json:
        print(f"histogram of document lengths: {options.histogram}")
    return 0


def _facts(tokens: "TokenSet", measured: "LengthStatistics", options: argparse.Namespace) -> dict[str, Any]:
    from megatron_qwen.data.token_files.manifest import read_manifest
    from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer

    noted = read_manifest(tokens.prefix)
    facts: dict[str, Any] = {
        "documents": tokens.num_documents,
        "tokens": tokens.num_tokens,
        "shards": len(tokens.files),
        "dtype": str(tokens.files[0].dtype),
        "tokens_per_document": tokens.num_tokens / tokens.num_documents,
        "median_length_at_least": measured.median,
        "first_document": tokens.files[0].document(0)[:_FIRST_TOKENS].tolist(),
        "longest_documents": [{"document": document, "tokens": length} for length, document in measured.longest],
        "lengths": [
            {"from": int(low), "below": int(high), "documents": int(documents), "tokens": int(count)}
            for low, high, documents, count in zip(
                measured.edges, measured.edges[1:], measured.documents, measured.tokens, strict=False
            )
        ],
    }
    if noted is not None:
        facts |= {"bytes_per_token": noted.text_bytes / noted.tokens, **asdict(noted)}
        facts["inputs"] = len(noted.inputs)
    if options.tokenizer is not None:
        tokenizer = load_tokenizer(options.tokenizer)
        facts["first_text"] = tokenizer.decode(facts["first_document"])
        spread = [tokens.num_documents * index // options.samples for index in range(options.samples)]
        facts["samples"] = {
            str(document): tokenizer.decode(_beginning(tokens, document))[:_SHOWN_CHARACTERS] for document in spread
        }
    return facts


def _beginning(tokens: "TokenSet", document: int) -> list[int]:
    start = tokens.document_start(document)
    stop = min(tokens.document_start(document + 1), start + _SHOWN_CHARACTERS)
    return [int(token) for token in tokens.tokens(start, stop)]


def _show(facts: dict[str, Any]) -> None:
    listed = {"lengths", "longest_documents", "samples", "control_tokens", "options", "first_document"}
    for name, value in facts.items():
        if name not in listed and value not in (None, [], {}):
            shown = f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
            if name == "first_text":
                shown = repr(value)
            elif name == "spelled_control_tokens":
                shown = ", ".join(f"{token} {count:,}" for token, count in value.items())
            elif name == "left_out":
                shown = f"{len(value):,} files of the input; --json names them"
            print(f"  {name:<24}{shown}")
    print("  length in tokens        documents           tokens")
    for row in facts["lengths"]:
        if row["documents"]:
            print(f"  {row['from']:>9,} - {row['below'] - 1:<9,} {row['documents']:>11,} {row['tokens']:>16,}")
    longest = ", ".join(f"{one['document']} ({one['tokens']:,} tokens)" for one in facts["longest_documents"][:5])
    print(f"  longest documents       {longest}")
    for document, text in facts.get("samples", {}).items():
        print(f"  document {document}: {text!r}")


def _draw(measured: "dict[str, LengthStatistics]", path: Path) -> None:
    """Shares of documents and of tokens by length, a line a source."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharex=True)
    for panel, kind in zip(panels, ("documents", "tokens"), strict=True):
        for name, one in measured.items():
            counts = getattr(one, kind)
            panel.stairs(
                100 * counts / counts.sum(), [max(edge, 0.5) for edge in one.edges], label=Path(name).name, lw=1.6
            )
        panel.set_xscale("log", base=2)
        panel.set_xlabel("tokens of a document")
        panel.set_ylabel(f"% of the {kind}")
        panel.grid(alpha=0.3)
    if len(measured) > 1:
        panels[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
