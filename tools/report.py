"""``mq report``: one self-contained HTML page of a run."""

import html
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_qwen.attempts import Attempt, AttemptLog
from megatron_qwen.cli import Parser, run_program
from megatron_qwen.config.render import difference, dump
from megatron_qwen.config.run import RunConfig
from megatron_qwen.config.source import resolve
from megatron_qwen.estimate.flops import FORMULA
from megatron_qwen.estimate.parameters import count_parameters
from megatron_qwen.metrics.console import duration
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory
from tools.recipes import layout_name
from tools.report_card import STYLE as CARD_STYLE
from tools.report_card import card_html, read_card
from tools.report_chats import draw as draw_chats
from tools.report_chats import filled, is_fine_tuning
from tools.report_ranks import draw, ranks_html, read_history
from tools.report_samples import samples_html
from tools.report_scores import draw as draw_scores
from tools.report_scores import scores_of, source_bits, table
from tools.run_records import read_metrics

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2430; background: #fbfbf9; margin: 0 }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem }
h1 { font-size: 1.7rem; margin: 0 0 .2rem } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem }
.what { color: #5b6472; margin: 0 0 1.6rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem }
.tile { background: #fff; border: 1px solid #e3e5e8; border-radius: .5rem; padding: .8rem 1rem }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums }
.tile span { color: #5b6472; font-size: .88rem }
figure { margin: 1rem 0; background: #fff; border: 1px solid #e3e5e8; border-radius: .5rem; padding: .6rem }
figure svg { width: 100%; height: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
td, th { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #e9ebee; vertical-align: top }
pre { background: #fff; border: 1px solid #e3e5e8; border-radius: .5rem; padding: .9rem 1rem; font-size: .85rem }
pre { overflow-x: auto; white-space: pre-wrap }
mark { background: #e8f0e4; color: inherit }
"""


@dataclass(frozen=True)
class Section:
    """A further part of the page: a heading, and HTML that is already safe."""

    title: str
    body: str


def write_report(run_dir: Path, output: Path, *, sections: Sequence[Section] = ()) -> None:
    """Writes the page.

    Args:
        run_dir: the run.
        output: the HTML file.
        sections: what else to show, after the curves.
    """
    directory = RunDirectory(run_dir)
    records, attempts = read_metrics(directory.metrics), AttemptLog(directory.attempts).read()
    card = read_card(directory.performance)
    config = resolve(str(directory.run_yaml), [], RECIPES)
    parts = [
        f"<h1>{html.escape(config.recipe)}: {html.escape(directory.path.name)}</h1>",
        f'<p class="what">{html.escape(_what(config))}</p>',
        _tiles(records, card),
        "<h2>Loss</h2>",
        f"<figure>{loss_figure(records)}</figure>",
        *_chats(records),
        *_samples(directory),
        *_scores(records, config),
        "<h2>Step</h2>",
        f"<figure>{step_figure(records)}</figure>",
        *_ranks(directory, records),
        *(["<h2>Performance card</h2>", card_html(card)] if card is not None else []),
        *(f"<h2>{html.escape(section.title)}</h2>{section.body}" for section in sections),
        "<h2>Attempts</h2>",
        _attempts(attempts),
        "<h2>Settings that differ from the recipe</h2>",
        _settings(config),
        f"<h2>How model FLOPs are counted</h2><p>{html.escape(FORMULA)}</p>",
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(directory.path.name)}</title><style>{_STYLE}{CARD_STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>"
    )
    output.write_text(page, encoding="utf-8")


def _what(config: RunConfig) -> str:
    count = count_parameters(config.model)
    active = f", {count.active / 1e6:,.1f}M active" if config.model.is_moe else ""
    return (
        f"recipe {config.recipe}: {count.total / 1e6:,.1f}M parameters{active}, {config.model.num_layers} layers, "
        f"layout {layout_name(config.parallel)}, {config.precision.dtype}, sequence {config.data.seq_length}"
    )


def _tiles(records: list[dict[str, Any]], card: dict[str, Any] | None) -> str:
    last, steady = records[-1], records[min(5, len(records) - 1) :]
    validation = [record["validation_loss"] for record in records if record.get("validation_loss") is not None]
    speed = statistics.median(record["tokens_per_second"] for record in steady)
    facts = [
        (f"{validation[-1]:.4f}" if validation else "none", "validation loss, nats per token"),
        (f"{last['lm_loss']:.4f}", f"training loss at step {last['iteration']}"),
        (f"{last['consumed_tokens'] / 1e6:,.2f}M", "tokens seen"),
        (f"{speed:,.0f}", "tokens per second, median"),
        (duration(sum(record["step_time_s"] for record in records)), "time in steps"),
    ]
    optional = {
        "MFU, median": [record["mfu"] for record in steady if record.get("mfu") is not None],
        "goodput: share of steps that count": [card["goodput"]["share"]] if card is not None else [],
    }
    facts += [(f"{statistics.median(values):.1%}", name) for name, values in optional.items() if values]
    if is_fine_tuning(records) and (share := filled(records)) is not None:
        facts.append((f"{share:.1%}", "of the rows' positions held tokens"))
    if memory := [record["peak_memory_gib"] for record in records if record.get("peak_memory_gib")]:
        facts.append((f"{max(memory):.2f} GiB", "peak memory of rank 0"))
    if skipped := sum(bool(record.get("skipped")) for record in records):
        facts.append((str(skipped), "steps skipped: not finite"))
    tiles = "".join(f'<div class="tile"><b>{value}</b><span>{text}</span></div>' for value, text in facts)
    return f'<div class="tiles">{tiles}</div>'


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata=no_metadata)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _figure(columns: int) -> tuple[Any, Any]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update(
        {
            "svg.fonttype": "none",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e9ebee",
            "axes.edgecolor": "#9aa1ab",
            "svg.hashsalt": "report",
        }
    )
    figure = Figure(figsize=(9.5, 3.1))
    return figure, figure.subplots(1, columns)


def loss_figure(records: list[dict[str, Any]]) -> str:
    """Training and validation loss over tokens, as SVG."""
    figure, axis = _figure(1)
    tokens = [record["consumed_tokens"] / 1e6 for record in records]
    axis.plot(tokens, [record["lm_loss"] for record in records], color="#8fa3bf", linewidth=1, label="training")
    measured = [
        (x, record["validation_loss"])
        for x, record in zip(tokens, records, strict=True)
        if record.get("validation_loss") is not None
    ]
    if measured:
        axis.plot(
            *zip(*measured, strict=True), color="#1f4e8c", marker="o", markersize=3.5, linewidth=1.4, label="validation"
        )
    skipped = [(x, record["lm_loss"]) for x, record in zip(tokens, records, strict=True) if record.get("skipped")]
    for x, _ in skipped:
        axis.axvline(x, color="#c2452d", linewidth=0.8)
    axis.set(xlabel="million tokens", ylabel="nats per token")
    axis.legend(frameon=False)
    return _svg(figure)


def _scores(records: list[dict[str, Any]], config: RunConfig) -> list[str]:
    scores, sources = scores_of(records), source_bits(records)
    if not scores and not sources:
        return []
    figure, axes = _figure(2)
    draw_scores(scores, sources, config.evaluation.tasks, axes)
    return ["<h2>Scores</h2>", f"<figure>{_svg(figure)}</figure>", table(scores)]


def _chats(records: list[dict[str, Any]]) -> list[str]:
    if not is_fine_tuning(records):
        return []
    figure, axes = _figure(2)
    draw_chats(records, axes)
    return ["<h2>Conversations</h2>", f"<figure>{_svg(figure)}</figure>"]


def _samples(directory: RunDirectory) -> list[str]:
    body = samples_html(directory.samples)
    return ["<h2>What it says</h2>", body] if body else []


def step_figure(records: list[dict[str, Any]]) -> str:
    """Speed, gradient norm and learning rate over steps, as SVG."""
    figure, axes = _figure(3)
    steps = [record["iteration"] for record in records]
    for axis, key, title in zip(
        axes,
        ("tokens_per_second", "grad_norm", "learning_rate"),
        ("tokens per second", "gradient norm", "learning rate"),
        strict=True,
    ):
        axis.plot(steps, [record[key] for record in records], color="#1f4e8c", linewidth=1)
        axis.set(title=title, xlabel="step")
        axis.set_ylim(bottom=0)
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
    figure.subplots_adjust(wspace=0.3)
    return _svg(figure)


def _ranks(directory: RunDirectory, records: list[dict[str, Any]]) -> list[str]:
    history = read_history(directory.stragglers)
    if history is None:
        return []
    figure, axis = _figure(1)
    draw(history, figure, axis)
    return ["<h2>Ranks</h2>", ranks_html(history, records, _svg(figure))]


def _attempts(attempts: Sequence[Attempt]) -> str:
    def shown(value: object) -> str:
        return "" if value is None else html.escape(str(value))

    def row(item: Attempt) -> str:
        reason = item.reason or ("still running, or killed" if item.ended is None else None)
        nodes = ", ".join(item.nodes)
        cells = (item.number, reason, item.detail, item.fault, nodes, item.exit_code, item.gained, item.action)
        return "<tr>" + "".join(f"<td>{shown(cell)}</td>" for cell in cells) + "</tr>"

    heads = ("attempt", "ended", "cause", "fault", "nodes", "exit code", "iterations gained", "action")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<table><tr>{head}</tr>{''.join(row(item) for item in attempts)}</table>"


def _settings(config: RunConfig) -> str:
    base = RECIPES[config.recipe]() if config.recipe in RECIPES else None
    changed = difference(config, base) if base is not None else {}
    return f"<pre>{html.escape(dump(changed) if changed else 'none')}</pre>"


def main(arguments: Sequence[str]) -> int:
    """Writes the page and says where."""
    parser = Parser(
        "mq report", description="Writes one self-contained HTML page of a run.", examples=["mq report runs/first"]
    )
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--output", type=Path, help="the file; default: report.html in the run directory")
    options = parser.parse_args(arguments)
    output = options.output or options.run / "report.html"
    write_report(options.run, output)
    print(output)
    return 0


if __name__ == "__main__":
    run_program(main)
