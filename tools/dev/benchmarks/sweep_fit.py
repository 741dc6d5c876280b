"""``mq bench sweep_fit``: the fit of 10,000 cells with 1,000 bootstrap resamples, against a minute."""

import time

import numpy as np

from tools.dev.benchmarks.rows import BenchmarkRow, against_limit
from tools.scaling.fit import Settings, fit
from tools.scaling.observations import Observation

_LIMIT_S = 60.0
_CELLS, _DRAWS = 10_000, 1_000
_RATES, _BATCHES = 5, 5


def run(*, rounds: int) -> list[BenchmarkRow]:
    """Ten thousand models and horizons; then four hundred, each with five learning rates and five batches."""
    generator = np.random.default_rng(0)
    studies = {"10,000 models": _models(generator), "400 models x 25 settings": _settings(generator)}
    rows = []
    for name, cells in studies.items():
        seconds = []
        for _ in range(rounds):
            started = time.perf_counter()
            found = fit(cells, Settings(draws=_DRAWS))
            seconds.append(time.perf_counter() - started)
            assert found.surface is not None
        conditions = f"{len(cells)} cells, {_DRAWS} bootstrap resamples, {rounds} rounds"
        rows.append(against_limit(f"mq sweep fit, {name}", seconds, limit=_LIMIT_S, unit="s", conditions=conditions))
    return rows


def _loss(n: float, d: float, generator: np.random.Generator) -> float:
    return float((1.8172 + 482.01 / n**0.3478 + 2085.43 / d**0.3658) * np.exp(0.01 * generator.standard_normal()))


def _models(generator: np.random.Generator) -> list[Observation]:
    sizes = np.exp(generator.uniform(np.log(1e7), np.log(1e10), _CELLS))
    tokens = np.exp(generator.uniform(np.log(1e9), np.log(1e12), _CELLS))
    return [Observation(n, d, _loss(n, d, generator)) for n, d in zip(sizes.tolist(), tokens.tolist(), strict=True)]


def _settings(generator: np.random.Generator) -> list[Observation]:
    cells = []
    for n in np.exp(np.linspace(np.log(1e7), np.log(1e10), 20)).tolist():
        for d in np.exp(np.linspace(np.log(1e9), np.log(1e12), 20)).tolist():
            rate, batch = 1.79 * n**-0.713 * d**0.307, 0.58 * d**0.571
            for i in range(_RATES):
                for j in range(_BATCHES):
                    x, z = np.log(2.0) * (i - 2.2), np.log(2.0) * (j - 1.7)
                    loss = _loss(n, d, generator) * np.exp(0.0065 * x * x + 0.006 * z * z - 0.005 * x * z)
                    cells.append(
                        Observation(n, d, float(loss), learning_rate=rate * np.exp(x), batch_tokens=batch * np.exp(z))
                    )
    return cells
