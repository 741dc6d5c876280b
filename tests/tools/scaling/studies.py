"""Studies drawn from known laws."""

from dataclasses import dataclass, field

import numpy as np

from tools.scaling.observations import DIVERGED, DONE, Observation

# Besiroglu et al. (arXiv 2404.10102), Hoffmann et al. (2203.15556), and one without much of a floor.
LOSS_LAWS = {
    "besiroglu": (1.8172, 482.01, 0.3478, 2085.43, 0.3658),
    "hoffmann": (1.69, 406.4, 0.34, 410.7, 0.28),
    "slow": (0.5, 20.0, 0.12, 30.0, 0.15),
}
# Step Law (arXiv 2503.04715), and one that moves otherwise.
SETTING_LAWS = {"step law": ((1.79, -0.713, 0.307), (0.58, 0.0, 0.571)), "other": ((0.5, -0.3, -0.1), (10.0, 0.1, 0.4))}
# Second derivatives near the optimum, of the size that Step Law's measured losses show.
CURVATURE = (0.013, 0.012, -0.005)


@dataclass(frozen=True)
class Study:
    """What is drawn.

    Args:
        loss: E, A, alpha, B, beta.
        settings: factor, exponent of N and of D, for the learning rate and the batch.
        noise: standard deviation of ln L.
        missing: share of cells that are not there.
        rates: learning rates of a model, a factor two apart.
        batches: batches of a model; 0 does not vary them.
        sizes: N.
        horizons: D / N.
    """

    loss: tuple[float, float, float, float, float] = LOSS_LAWS["besiroglu"]
    settings: tuple[tuple[float, float, float], tuple[float, float, float]] = SETTING_LAWS["step law"]
    noise: float = 0.0
    missing: float = 0.1
    rates: int = 6
    batches: int = 5
    sizes: tuple[float, ...] = tuple(np.exp(np.linspace(np.log(1e7), np.log(3e9), 8)))
    horizons: tuple[float, ...] = (5, 20, 80, 160)
    curvature: tuple[float, float, float] = field(default=CURVATURE)

    def draw(self, seed: int) -> list[Observation]:
        """Cells, some missing, those far above the best learning rate diverged."""
        generator = np.random.default_rng(seed)
        cells = []
        for n in self.sizes:
            for horizon in self.horizons:
                d = horizon * n
                best = [factor * n**a * d**b for factor, a, b in self.settings]
                rates = grid(best[0], self.rates, generator)
                batches = grid(best[1], self.batches, generator) if self.batches else [None]
                cells += [self._cell(n, d, best, rate, batch, generator) for rate in rates for batch in batches]
        return [cell for cell in cells if cell is not None]

    def _cell(self, n, d, best, rate, batch, generator):
        e, a, alpha, b, beta = self.loss
        x, z = np.log(rate / best[0]), 0.0 if batch is None else np.log(batch / best[1])
        above = 0.5 * (self.curvature[0] * x * x + self.curvature[1] * z * z) + self.curvature[2] * x * z
        loss = (e + a / n**alpha + b / d**beta) * np.exp(above + self.noise * generator.standard_normal())
        if generator.random() < self.missing:
            return None
        status = DIVERGED if x > 1.7 else DONE
        return Observation(n, d, loss if status == DONE else np.nan, status, learning_rate=rate, batch_tokens=batch)


def grid(centre: float, count: int, generator: np.random.Generator) -> list[float]:
    """Powers of two about a place that is not quite the best."""
    middle = round(np.log2(centre) + generator.uniform(-1, 1))
    return [2.0 ** (middle + number - count // 2) for number in range(count)]
