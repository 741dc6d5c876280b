"""``mq bench sweep_report``: opening the page of a study of 1,000 cells, and its size, against limits."""

import tempfile
import time
from pathlib import Path

import numpy as np

from tools.dev.benchmarks.browser import DRAWN, running
from tools.dev.benchmarks.rows import BenchmarkRow, against_limit
from tools.scaling import fit_file
from tools.scaling.fit import Settings, fit
from tools.scaling.observations import Observation
from tools.scaling.report import content, write
from tools.scaling.study_results import StudyResults

_LIMIT_S, _LIMIT_MB = 2.0, 5.0
_SIZES, _HORIZONS, _RATES, _BATCHES = 10, 4, 5, 5


def run(*, rounds: int) -> list[BenchmarkRow]:
    """Ten sizes, four horizons, five learning rates and five batches."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        cells = _cells(np.random.default_rng(0))
        fitted = fit(cells, Settings(draws=200))
        document = fit_file.document(fitted, source="drawn")
        write.write(content.Content(StudyResults("drawn", cells), fitted, document, document["notes"]), page, None)
        megabytes = page.stat().st_size / 1e6
        seconds = []
        with running() as browser:
            for _ in range(rounds):
                tab = browser.new_page()
                started = time.perf_counter()
                tab.goto(page.as_uri())
                tab.wait_for_function(DRAWN)
                seconds.append(time.perf_counter() - started)
                tab.close()
    conditions = f"{len(cells)} cells, headless Chromium, until every chart is drawn, {rounds} rounds"
    return [
        against_limit("mq sweep report, opening its page", seconds, limit=_LIMIT_S, unit="s", conditions=conditions),
        against_limit("mq sweep report, its page", [megabytes], limit=_LIMIT_MB, unit="MB", conditions=conditions),
    ]


def _cells(generator: np.random.Generator) -> list[Observation]:
    """From the law of Besiroglu et al. (arXiv 2404.10102) and the settings of Step Law (arXiv 2503.04715)."""
    cells = []
    for n in np.exp(np.linspace(np.log(1e7), np.log(3e9), _SIZES)).tolist():
        for d in (n * np.array([5.0, 20.0, 80.0, 160.0])[:_HORIZONS]).tolist():
            level = 1.8172 + 482.01 / n**0.3478 + 2085.43 / d**0.3658
            rate, batch = 1.79 * n**-0.713 * d**0.307, 0.58 * d**0.571
            for x in np.log(2.0) * (np.arange(_RATES) - 2.2):
                for z in np.log(2.0) * (np.arange(_BATCHES) - 1.7):
                    away = 0.0065 * x * x + 0.006 * z * z - 0.005 * x * z + 0.003 * generator.standard_normal()
                    name = f"n{n:.3g}_d{d:.3g}_lr{rate * np.exp(x):.3g}_b{batch * np.exp(z):.3g}"
                    loss, settings = float(level * np.exp(away)), (float(rate * np.exp(x)), float(batch * np.exp(z)))
                    cells.append(
                        Observation(n, d, loss, learning_rate=settings[0], batch_tokens=settings[1], name=name)
                    )
    return cells
