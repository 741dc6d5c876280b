"""Writes a report: the page, and next to it the charts as files and the data as CSV."""

from pathlib import Path

from megatron_qwen.files import atomic_write
from tools.scaling.observations import write_csv
from tools.scaling.report import vega
from tools.scaling.report.charts import charts
from tools.scaling.report.content import Content
from tools.scaling.report.page import render


def write(content: Content, page: Path, figures: Path | None) -> list[Path]:
    """Writes all of it.

    Args:
        content: what is shown.
        page: the HTML file.
        figures: folder of SVG, PNG and CSV files; None for none.

    Returns:
        What was written.
    """
    drawn = charts(content.results.observations, content.fit)
    atomic_write(page, render(content, drawn))
    written = [page]
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
        for chart in drawn:
            (figures / f"{chart.name}.svg").write_text(vega.svg(chart.spec), encoding="utf-8")
            (figures / f"{chart.name}.png").write_bytes(vega.png(chart.spec))
        write_csv(figures / "observations.csv", content.results.observations)
        written.append(figures)
    return written
