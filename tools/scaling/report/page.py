"""The page of a report: one file that needs no network and no server."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

from tools.scaling.fit_file import coefficient, setting_laws
from tools.scaling.observations import STATUSES, write_observations
from tools.scaling.report import tables, vega
from tools.scaling.report.charts import Chart
from tools.scaling.report.content import Content, counted

_HERE = Path(__file__).parent
# Nothing is ever loaded; `unsafe-eval` is how Vega computes its expressions.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; img-src data: blob:"


def render(content: Content, charts: Sequence[Chart]) -> str:
    """The page as HTML."""
    parts = [
        f"<h1>{html.escape(content.results.title)}</h1>",
        f'<p class="what">{html.escape(_what(content))}</p>',
        _tiles(content),
        _law(content),
        "<h2>Charts</h2>",
        '<p class="note">Drag to move, ctrl and the wheel to zoom, double click to go back; the menu of a chart saves '
        "it.</p>",
        f'<div class="charts">{"".join(map(_figure, charts))}</div>',
        *_tables(content),
        f"<h2>Cells</h2>{tables.cells(content)}",
        f'<p><a download="observations.csv" href="{_csv(content)}">All cells as CSV</a></p>',
    ]
    title, style = html.escape(content.results.title), (_HERE / "page.css").read_text()
    drawn = json.dumps({chart.name: chart.spec for chart in charts}, allow_nan=False, separators=(",", ":"))
    # What would end the element it stands in, spelt so that JSON reads the same.
    specs = drawn.replace("<", "\\u003c")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{style}</style></head><body><main>{''.join(parts)}</main>"
        f'<script type="application/json" id="specs">{specs}</script>'
        f"<script>{vega.script()}</script><script>{(_HERE / 'page.js').read_text()}</script></body></html>\n"
    )


def _what(content: Content) -> str:
    counts = {status: sum(one.status == status for one in content.results.observations) for status in STATUSES}
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    sizes = [counted(one, embeddings=content.embeddings) for one in content.results.observations]
    tokens = [one.tokens for one in content.results.observations]
    spread = f"N {min(sizes):.3g} to {max(sizes):.3g}, D {min(tokens):.3g} to {max(tokens):.3g}"
    embeddings = f"; N {'with' if content.embeddings else 'without'} embeddings"
    device = f"; {content.results.device}" if content.results.device else ""
    return f"{len(content.results.observations)} cells ({told}); {spread}{embeddings}{device}"


def _tiles(content: Content) -> str:
    facts = []
    headline = content.document.get("headline")
    if headline:
        facts.append(
            (f"{headline['leave_largest_out_error']:.2%}", "error of predicting the largest size from the smaller ones")
        )
    if content.fit is not None and content.fit.surface is not None:
        surface = content.fit.surface
        facts += [
            (f"{surface.named(name):.3f}", f"{name}, exponent of {of}") for name, of in (("alpha", "N"), ("beta", "D"))
        ]
        facts.append((f"{surface.spread:.2%}", "scatter of the loss about the law"))
    done = [one.loss for one in content.results.observations if one.status == "done"]
    if done:
        facts.append((f"{min(done):.4f}", "lowest loss, nats per token"))
    if content.results.spent:
        budget = f" of {content.results.budget_hours:g}" if content.results.budget_hours is not None else ""
        facts.append((f"{sum(one.spent for one in content.results.spent):.3g}{budget}", "device-hours spent"))
    tiles = "".join(f'<div class="tile"><b>{value}</b><span>{text}</span></div>' for value, text in facts)
    return f'<div class="tiles">{tiles}</div>'


def _law(content: Content) -> str:
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in content.notes)
    surface = content.document.get("surface")
    law = f'<p class="law">{_formula(surface["coefficients"])}</p>' if surface else ""
    return law + (f'<ul class="note">{notes}</ul>' if notes else "")


def _formula(coefficients: dict[str, dict[str, float]]) -> str:
    """The law of the loss with its numbers."""
    value = {name: found for name, found, *_ in (coefficient(*item) for item in coefficients.items())}
    powers = (("N", "alpha"), ("S", "sigma"), ("G", "gamma"))
    size = " ".join(f"{letter}<sup>{value[name]:.3f}</sup>" for letter, name in powers if name in value)
    size = f"({size})" if " " in size else size
    return f"L = {value['E']:.3f} + {value['A']:.4g} / {size} + {value['B']:.4g} / D<sup>{value['beta']:.3f}</sup>"


def _figure(chart: Chart) -> str:
    return (
        f'<figure><h3>{html.escape(chart.title)}</h3><div class="chart" id="chart-{chart.name}"></div>'
        f"<figcaption>{html.escape(chart.caption)}</figcaption></figure>"
    )


def _tables(content: Content) -> list[str]:
    document = content.document
    found = []
    if document.get("headline"):
        found.append(f"<h2>Prediction of the largest size</h2>{tables.left_out(document)}")
    if document.get("surface"):
        found.append(f"<h2>Law of the loss</h2>{tables.coefficients(document)}")
    if document.get("on_par"):
        found.append(f"<h2>MoE models compared with dense models</h2>{tables.on_par(document)}")
    if document.get("optima"):
        lines = setting_laws(document["settings_laws"]) if document.get("settings_laws") else []
        laws = "".join(f'<p class="law">{html.escape(line)}</p>' for line in lines)
        found.append(f"<h2>Best settings</h2>{laws}{tables.optima(document)}")
    if content.results.spent:
        found.append(f"<h2>Budget</h2>{tables.budget(content)}")
    if lost := tables.lost(content):
        found.append(f"<h2>Diverged, failed, dropped</h2>{lost}")
    return found


def _csv(content: Content) -> str:
    text = io.StringIO(newline="")
    write_observations(text, content.results.observations)
    return "data:text/csv;base64," + base64.b64encode(text.getvalue().encode()).decode()
