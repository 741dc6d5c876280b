"""Losses as a sum of power laws, fitted to logarithms with a robust loss.

ln L = logsumexp over terms of (features of the term) . (its coefficients): for L = E + A / N^a + B / D^b the terms are
[1], [1, -ln N] and [1, -ln D] with the coefficients ln E, ln A, a, ln B, b. That is approach 3 of Hoffmann et al.
(arXiv 2203.15556, section 3.3): the Huber loss of ln L with delta = 1e-3, summed (Besiroglu et al., arXiv 2404.10102,
found that its mean stops an optimizer too early).
"""

from dataclasses import dataclass

import numpy as np

from tools.scaling.observations import Array, Chosen

DELTA = 1e-3
# A row ends when its step is below the tolerance, relative to its coefficients; the number of steps bounds rows that do
# not.
_STEPS, _TOLERANCE = 300, 1e-9
# Resamples x points refined together, so that the arrays of a step stay in a cache. Chosen by hand.
_CHUNK_ELEMENTS = 60_000


@dataclass(frozen=True)
class Terms:
    """The shape of a law over given points.

    Args:
        features: of each term, [features of the term, n], the first a row of ones.
        names: of all coefficients, in order.
    """

    features: tuple[Array, ...]
    names: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of coefficients."""
        return len(self.names)

    def slices(self) -> list[slice]:
        """Where each term's coefficients are."""
        found, begin = [], 0
        for block in self.features:
            found.append(slice(begin, begin + len(block)))
            begin += len(block)
        return found

    def only(self, chosen: Chosen) -> "Terms":
        """The same law over some of the points.

        Args:
            chosen: mask or indices, [n].
        """
        return Terms(tuple(block[:, chosen] for block in self.features), self.names)

    def predict(self, coefficients: Array) -> Array:
        """ln L: [p] -> [n], [r, p] -> [r, n]."""
        return _parts(self, np.atleast_2d(coefficients))[0].reshape(*coefficients.shape[:-1], -1)


def moe(active: Array, tokens: Array, sparsity: Array | None = None, granularity: Array | None = None) -> Terms:
    """L = E + A / (N^alpha S^sigma G^gamma) + B / D^beta: for dense models L = E + A / N^alpha + B / D^beta.

    Args:
        active: N, parameters that a token meets, [n].
        tokens: D, [n].
        sparsity: S, all parameters over active ones, [n]; None leaves the factor out.
        granularity: G, a dense feed-forward over an expert, [n]; None leaves the factor out.
    """
    one = np.ones((1, len(active)))
    further = {"sigma": sparsity, "gamma": granularity}
    kept = {name: values for name, values in further.items() if values is not None}
    size = np.vstack((one, -np.log(active), *(-np.log(values)[None] for values in kept.values())))
    names = ("ln_E", "ln_A", "alpha", *kept, "ln_B", "beta")
    return Terms((one, size, np.vstack((one, -np.log(tokens)))), names)


def fit(terms: Terms, log_loss: Array, *, weights: Array | None = None, delta: float = DELTA) -> Array:
    """Coefficients of the least summed Huber loss, from many starts, [p].

    Args:
        terms: the law over the points.
        log_loss: ln L, [n].
        weights: of the points, [n]; None is 1 each.
        delta: residual in ln L from which the loss grows linearly.
    """
    from scipy.optimize import minimize

    centred, shift = _centred(terms)
    weights = np.ones(len(log_loss)) if weights is None else weights
    starts = _starts(centred, log_loss)
    order = np.argsort(_objective(centred, starts, log_loss[None], weights[None], delta))
    best, least = starts[order[0]], np.inf
    for index in order[:12]:  # the most promising of a grid of starts; twelve chosen by hand
        # In units of delta: the optimizer's own tolerances mean nothing at 1e-6.
        answer = minimize(
            _value_and_slope,
            starts[index],
            args=(centred, log_loss, weights, delta),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 500, "maxfun": 1000},
        )
        if answer.fun < least:
            best, least = answer.x, float(answer.fun)
    polished: Array = refine(centred, log_loss[None], weights[None], start=best, delta=delta)[0] @ shift
    return polished


def refit(terms: Terms, log_loss: Array, weights: Array, *, start: Array, delta: float = DELTA) -> Array:
    """Coefficients for many bootstrap resamples, started from the fit of the data itself.

    Args:
        terms: the law over the points.
        log_loss: of every resample, [r, n] or [1, n].
        weights: of the points in every resample, [r, n] or [1, n].
        start: the fit, [p].
        delta: as for ``fit``.

    Returns:
        [r, p].
    """
    centred, shift = _centred(terms)
    begin = np.linalg.solve(shift.T, start)
    rows = max(len(log_loss), len(weights))
    size = max(1, _CHUNK_ELEMENTS // max(1, terms.features[0].shape[1]))
    found = np.empty((rows, terms.size))
    for first in range(0, rows, size):
        span = slice(first, first + size)
        y = log_loss[span] if len(log_loss) > 1 else log_loss
        w = weights[span] if len(weights) > 1 else weights
        count = min(size, rows - first)
        found[span] = refine(
            centred,
            np.broadcast_to(y, (count, y.shape[1])),
            np.broadcast_to(w, (count, w.shape[1])),
            start=begin,
            delta=delta,
        )
    return found @ shift


def _centred(terms: Terms) -> tuple[Terms, Array]:
    """The law with features about their mean, and the matrix that takes its coefficients back: theta = centred @ it."""
    blocks, matrix, begin = [], np.eye(terms.size), 0
    for block in terms.features:
        mean = block.mean(axis=1, keepdims=True)
        mean[0] = 0.0
        blocks.append(block - mean)
        # ln A + a f = (ln A + a mean) + a (f - mean): the constant takes what the mean took.
        matrix[begin + 1 : begin + len(block), begin] = -mean[1:, 0]
        begin += len(block)
    return Terms(tuple(blocks), terms.names), matrix


def _starts(terms: Terms, log_loss: Array) -> Array:
    """Starts over shares of the loss at the centre and exponents, [starts, p]."""
    centre, floor = float(np.median(log_loss)), float(log_loss.min())
    found = []
    for share in (0.3, 0.6, 0.8, 0.95):
        constant = floor + np.log(share)
        rest = np.exp(centre) - np.exp(constant)  # at least a twentieth of the loss: the floor is its least
        for part in (0.15, 0.5, 0.85):
            for first in (0.1, 0.3, 0.5, 0.9):
                for second in (0.1, 0.3, 0.5, 0.9):
                    start = np.zeros(terms.size)
                    sizes, data = terms.slices()[1:]
                    start[0] = constant
                    start[sizes.start], start[sizes.start + 1] = np.log(part * rest), first
                    start[data.start], start[data.start + 1] = np.log((1 - part) * rest), second
                    found.append(start)
    return np.array(found)


def _parts(terms: Terms, theta: Array) -> tuple[Array, list[Array]]:
    """ln L [r, n] and each term's share of L [r, n]."""
    logs = [theta[:, where] @ block for where, block in zip(terms.slices(), terms.features, strict=True)]
    top = np.maximum.reduce(logs)
    shares = [np.exp(one - top) for one in logs]
    total = sum(shares[1:], shares[0].copy())
    return top + np.log(total), [share / total for share in shares]


def _huber(residual: Array, delta: float) -> Array:
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


def _objective(terms: Terms, theta: Array, y: Array, weights: Array, delta: float) -> Array:
    """Summed loss of each row of coefficients, [r]."""
    return np.asarray((weights * _huber(_parts(terms, theta)[0] - y, delta)).sum(axis=1))


def _value_and_slope(theta: Array, terms: Terms, y: Array, weights: Array, delta: float) -> tuple[float, Array]:
    """The loss in units of delta, and its gradient."""
    model, shares = _parts(terms, theta[None])
    residual = (model - y)[0]
    force = weights * np.clip(residual / delta, -1.0, 1.0)
    slope = np.concatenate([block @ (force * share[0]) for block, share in zip(terms.features, shares, strict=True)])
    return float((weights * _huber(residual, delta)).sum() / delta), slope


def refine(terms: Terms, y: Array, weights: Array, *, start: Array, delta: float) -> Array:
    """Iteratively reweighted Gauss-Newton steps with Levenberg's damping, every row for itself, [r, p].

    A residual beyond delta weighs delta / |residual|: the squares then lie above the Huber loss and touch it, so a
    step that lowers them lowers it (Holland and Welsch 1977).
    """
    rows = len(y)
    theta = np.tile(start, (rows, 1))
    damping = np.full(rows, 1e-4)
    model, shares = _parts(terms, theta)
    value = (weights * _huber(model - y, delta)).sum(axis=1)
    active = np.arange(rows)
    for _ in range(_STEPS):
        residual = (model - y)[active]
        robust = weights[active] * np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
        slopes = np.concatenate(
            [share[active, None, :] * block for block, share in zip(terms.features, shares, strict=True)], axis=1
        )  # [r, p, n]
        weighted = slopes * robust[:, None, :]
        normal = weighted @ slopes.transpose(0, 2, 1)
        gradient = (weighted @ residual[:, :, None])[:, :, 0]
        diagonal = np.einsum("rpp->rp", normal)
        lifted = normal + np.einsum("rp,pq->rpq", damping[active, None] * diagonal + 1e-15, np.eye(terms.size))
        step = np.linalg.solve(lifted, gradient[:, :, None])[:, :, 0]
        tried = theta[active] - step
        new_model, new_shares = _parts(terms, tried)
        new_value = (weights[active] * _huber(new_model - y[active], delta)).sum(axis=1)
        better = new_value <= value[active]
        taken = active[better]
        theta[taken], model[taken], value[taken] = tried[better], new_model[better], new_value[better]
        for share, new in zip(shares, new_shares, strict=True):
            share[taken] = new[better]
        damping[active] = np.where(better, np.maximum(damping[active] * 0.2, 1e-9), damping[active] * 8.0)
        small = np.abs(step).max(axis=1) < _TOLERANCE * np.maximum(1.0, np.abs(theta[active]).max(axis=1))
        going = ~(small | (damping[active] > 1e8))
        active = active[going]
        if not len(active):
            break
    return theta
