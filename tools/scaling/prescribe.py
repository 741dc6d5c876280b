"""From a fit to the configuration of a large run: every number with where it comes from."""

import math
from dataclasses import dataclass, replace

import numpy as np

from megatron_qwen.config.render import to_yaml
from megatron_qwen.config.run import RunConfig
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.estimate.hardware import Hardware
from megatron_qwen.estimate.layouts import LayoutEstimate, layouts
from tools.scaling.fit_file import FitFile
from tools.scaling.ladder import ModelShape, shape_near
from tools.scaling.predict import predict
from tools.scaling.surface import Points

# Compute of the wanted run over that of the largest fitted one: said from here on, and refused from there on.
WARN_FACTOR, REFUSE_FACTOR = 10.0, 1000.0
# A batch may be rounded so far to fit a layout.
_ROUNDING = 0.1
# Words of the notes in fit.json that say what the study leaves open; "tell" is from fits of earlier versions.
_DOUBTS = ("does not determine", "do not determine", "no minimum", "does not tell", "do not tell")
# Beyond these a law has left what can be trained.
_PLAUSIBLE = {"learning_rate": (1e-8, 10.0), "batch_tokens": (1.0, 1e10)}
_SIZES, _WARMUP_SHARE = 15, 0.05


@dataclass(frozen=True)
class Wish:
    """What somebody wants.

    Args:
        base: recipe with overrides; what the fit does not say stays its.
        params: N as the fit counts it; None with ``gpu_hours``.
        tokens: D; None with ``gpu_hours``.
        gpu_hours: a budget, for which N and D are chosen.
        gpus: devices.
        device: their kind.
        refuse_factor: compute beyond the largest fitted one that is refused.
    """

    base: RunConfig
    params: float | None
    tokens: float | None
    gpu_hours: float | None
    gpus: int
    device: Hardware
    refuse_factor: float = REFUSE_FACTOR


@dataclass(frozen=True)
class Prescription:
    """What the fit prescribes.

    Args:
        config: the run.
        origins: where each number comes from, by ``section.field``.
        layout: the planner's choice.
        shape: of the model.
        params: N as the fit counts it.
        tokens: D.
        loss: predicted; None where the fit has no law of the loss.
        interval: 90 % of ``loss``: of the law, and of one run's scatter about it.
        hours: of the run.
        beyond: compute over that of the largest fitted point.
        warnings: what to know before believing it.
        metric: what ``loss`` is, by its name in metrics.jsonl; None is the loss itself.
    """

    config: RunConfig
    origins: dict[str, str]
    layout: LayoutEstimate
    shape: ModelShape
    params: float
    tokens: float
    loss: float | None
    interval: tuple[float, float] | None
    hours: float
    beyond: float
    warnings: list[str]
    metric: str | None = None

    def yaml(self) -> str:
        """run.yaml with a comment on every number that was prescribed."""
        lines, section = [], ""
        for line in to_yaml(self.config).splitlines():
            if line and not line[0].isspace():
                section = line.split(":")[0]
            name = line.strip().split(":")[0]
            origin = self.origins.get(f"{section}.{name}") if line[:1].isspace() else None
            lines.append(line + (f"  # {origin}" if origin else ""))
        head = []
        if self.loss is not None and self.interval is not None:
            low, high = self.interval
            head = [f"# Predicted {self.metric or 'loss'} {self.loss:.4f} ({low:.4f} to {high:.4f}, 90 %)."]
        return "\n".join([*head, *(f"# {warning}" for warning in self.warnings), *lines]) + "\n"


def prescribe(fit: FitFile, wish: Wish) -> Prescription:
    """The run for a wish.

    Raises:
        ConfigError: no layout fits, or the wish lies too far beyond what was fitted.
    """
    if wish.gpu_hours is not None:
        return _for_hours(fit, wish)
    assert wish.params is not None
    assert wish.tokens is not None
    shape, params = _shape(fit, wish.base, wish.params)
    return _for_shape(fit, wish, shape, params, wish.tokens, chosen="asked for")


def _shape(fit: FitFile, base: RunConfig, params: float) -> tuple[ModelShape, float]:
    """The family's shape with so many parameters as the fit counts them, and its exact count."""
    if not fit.settings.embeddings:
        shape = shape_near(base, params)
        return shape, float(shape.params)
    wanted = params
    for _ in range(8):  # what the embeddings take depends on the width
        shape = shape_near(base, max(wanted, 1e3))
        wanted = max(params - shape.embedding, params / 100)
    return shape, float(shape.params + shape.embedding)


def _for_hours(fit: FitFile, wish: Wish) -> Prescription:
    """The size whose predicted loss is least for a budget: small ones see more tokens."""
    if fit.surface is None:
        raise ConfigError(
            Problem("--gpu-hours", wish.gpu_hours, "requires a law of the loss, which the fit lacks; see its notes.")
        )
    assert wish.gpu_hours is not None
    shape, params = _shape(fit, wish.base, float(fit.points.params.max()))
    if why := _another_kind(fit, _point(shape, params, params)):
        raise ConfigError(Problem("--recipe", wish.base.recipe, f"cannot be sized by this fit: {why}."))
    smallest, largest = float(fit.points.params.min()), float(fit.points.params.max()) * wish.refuse_factor
    best, least, seen = None, math.inf, set()
    for wanted in np.exp(np.linspace(math.log(smallest), math.log(largest), 2 * _SIZES)):
        shape, params = _shape(fit, wish.base, float(wanted))
        if shape.model in seen:
            continue
        seen.add(shape.model)
        found, _ = layouts(_with_shape(wish.base, shape), world_size=wish.gpus, device=wish.device)
        if not found:
            continue
        tokens = found[0].tokens_per_second * wish.gpu_hours * 3600
        loss = float(fit.surface.loss(_point(shape, params, tokens))[0])
        if loss < least:
            best, least = (shape, params, tokens), loss
        elif loss > least * 1.05:
            break
    if best is None:
        fix = f"x {wish.device.name} cannot hold any size of this family; use more devices or another recipe."
        raise ConfigError(Problem("--gpus", wish.gpus, fix))
    chosen = f"least predicted loss for {wish.gpu_hours:g} GPU-hours"
    shape, params, tokens = best
    first = _for_shape(fit, wish, shape, params, tokens, chosen=chosen)
    # The speed was that of the recipe's batch; the law's batch has another layout.
    return _for_shape(fit, wish, shape, params, tokens * wish.gpu_hours / (first.hours * wish.gpus), chosen=chosen)


def _with_shape(base: RunConfig, shape: ModelShape) -> RunConfig:
    return replace(base, recipe="custom", model=shape.model)


def _point(shape: ModelShape, params: float, tokens: float) -> Points:
    one = np.ones(1)
    return Points(
        one * params,
        one * tokens,
        np.zeros(1),
        one * max(1.0, shape.total / shape.params),
        one * (shape.granularity or 1.0),
    )


def _for_shape(
    fit: FitFile, wish: Wish, shape: ModelShape, params: float, tokens: float, *, chosen: str
) -> Prescription:
    point = _point(shape, params, tokens)
    beyond = params * tokens / float((fit.points.params * fit.points.tokens).max())
    warnings = _extrapolation(fit, wish, params, tokens, beyond)
    config = _with_shape(wish.base, shape)
    origins = {
        f"model.{name}": f"{params:.4g} parameters ({chosen}) in the family's ratios"
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    }
    config = _own_length(config, warnings)
    layout = _batch_and_layout(fit, wish, config, params, tokens, origins, warnings)
    config = _learning_rate(fit, layout.config, params, tokens, origins, warnings)
    sequences = config.training.global_batch_size
    iterations = max(1, math.ceil(tokens / (sequences * config.data.seq_length)))
    warmup = min(config.optim.lr_warmup_iters, int(_WARMUP_SHARE * iterations))
    config = config.with_section("training", train_iters=iterations).with_section("optim", lr_warmup_iters=warmup)
    origins["training.train_iters"] = f"{tokens:.4g} tokens ({chosen})"
    origins["training.micro_batch_size"] = f"mq plan for {wish.gpus} x {wish.device.name}"
    for name in ("tensor", "pipeline", "context", "expert"):
        origins[f"parallel.{name}{'_model' if name != 'context' else ''}_parallel_size"] = origins[
            "training.micro_batch_size"
        ]
    if warmup < wish.base.optim.lr_warmup_iters:
        origins["optim.lr_warmup_iters"] = f"{_WARMUP_SHARE:.0%} of the run, less than the recipe's"
    realised = iterations * sequences * config.data.seq_length
    for name, wanted, value in (("parameters", wish.params, params), ("tokens", wish.tokens, realised)):
        if wanted is not None and abs(math.log(value / wanted)) > _ROUNDING:
            warnings.append(f"{value:.4g} {name} are the nearest to the {wanted:.4g} asked for")
    loss, interval = _loss(fit, point, warnings)
    hours = iterations * layout.time.seconds / 3600
    return Prescription(
        config, origins, layout, shape, params, tokens, loss, interval, hours, beyond, warnings, fit.metric
    )


def _extrapolation(fit: FitFile, wish: Wish, params: float, tokens: float, beyond: float) -> list[str]:
    largest = float((fit.points.params * fit.points.tokens).max())
    fitted = f"the largest fitted point (N D = {largest:.3g})"
    if beyond > wish.refuse_factor:
        fix = (
            f"is {beyond:.3g} times the compute of {fitted}; beyond {wish.refuse_factor:g} times a fit is "
            "not reliable. Fit larger models, or raise --refuse-factor."
        )
        raise ConfigError(Problem("run", f"N = {params:.3g}, D = {tokens:.3g}", fix))
    warnings = [note for note in fit.notes if any(words in note for words in _DOUBTS)]
    if beyond < 1 / wish.refuse_factor:
        fix = f"is {beyond:.3g} times the compute of {fitted}: far below what was fitted, where it is not reliable."
        raise ConfigError(Problem("run", f"N = {params:.3g}, D = {tokens:.3g}", fix))
    if beyond > WARN_FACTOR:
        warnings.append(f"extrapolates {beyond:.3g} times beyond the compute of {fitted}")
    ratio, ratios = tokens / params, fit.points.tokens / fit.points.params
    if not ratios.min() / 2 <= ratio <= ratios.max() * 2:
        warnings.append(
            f"{ratio:.3g} tokens per parameter are outside {ratios.min():.3g} to {ratios.max():.3g} that were fitted"
        )
    return warnings


def _own_length(config: RunConfig, warnings: list[str]) -> RunConfig:
    """The recipe without what was meant for its own length."""
    if config.training.rampup_batch_size is not None:
        warnings.append("the recipe's ramp of the batch is left out: the tokens are counted at the full batch")
        config = config.with_section("training", rampup_batch_size=None)
    if config.optim.lr_decay_iters is not None or config.optim.lr_wsd_decay_iters is not None:
        warnings.append("the recipe's decay was for its own length: it is the last tenth (wsd) or the whole run now")
    return config.with_section("optim", lr_decay_iters=None, lr_wsd_decay_iters=None)


def _learning_rate(
    fit: FitFile, config: RunConfig, params: float, tokens: float, origins: dict[str, str], warnings: list[str]
) -> RunConfig:
    batch = config.training.global_batch_size * config.data.seq_length
    answer = _setting(fit, "learning_rate", params, tokens, batch=batch)
    if answer is None:
        warnings.append("the fit does not determine the best learning rate: the recipe's is kept")
        return config
    value, low, high = answer
    share = config.optim.min_learning_rate / config.optim.learning_rate
    origins["optim.learning_rate"] = f"law of the best learning rate at this batch, {low:.2e} to {high:.2e} (90 %)"
    origins["optim.min_learning_rate"] = f"{share:.2g} of the peak, as in the recipe"
    return config.with_section("optim", learning_rate=_short(value), min_learning_rate=_short(value * share))


def _setting(
    fit: FitFile, name: str, params: float, tokens: float, *, batch: float | None = None
) -> tuple[float, float, float] | None:
    """The best value of a setting and its 90 % interval; None where the fit has none that a run could take.

    Args:
        fit: the laws.
        name: learning_rate or batch_tokens.
        params: N.
        tokens: D.
        batch: tokens of a step where they are not free: the best rate is then that of this batch.
    """
    basin = fit.basin
    if basin is None or name not in basin.variables or not len(basin.draws):
        return None
    v = basin.variables.index(name)
    at = (math.log(params), math.log(tokens))
    centre = basin.best(np.array([at[0]]), np.array([at[1]]))[0]
    draws = basin.best_draws(*at)
    if batch is not None and "batch_tokens" in basin.variables:
        z = basin.variables.index("batch_tokens")
        tilt = basin.curvature[v, z] / basin.curvature[v, v]
        centre = centre - tilt * (math.log(batch) - centre[z])
        draws = draws - tilt * (math.log(batch) - draws[:, [z]])
    low, high = np.percentile(draws[:, v], [5, 95])
    least, most = _PLAUSIBLE[name]
    if not (least < float(np.exp(np.clip(centre[v], -99, 99))) < most):
        return None
    return math.exp(centre[v]), float(np.exp(np.clip(low, -99, 99))), float(np.exp(np.clip(high, -99, 99)))


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _batch_and_layout(
    fit: FitFile,
    wish: Wish,
    config: RunConfig,
    params: float,
    tokens: float,
    origins: dict[str, str],
    warnings: list[str],
) -> LayoutEstimate:
    answer = _setting(fit, "batch_tokens", params, tokens)
    length = config.data.seq_length
    if answer is None:
        warnings.append("the fit does not determine the best batch: the recipe's is kept")
        sizes = [config.training.global_batch_size]
    else:
        wanted = answer[0] / length
        sizes = list(_legal_sizes(wanted, wish.gpus))
    for size in sizes:
        found, rejected = layouts(
            config.with_section("training", global_batch_size=size), world_size=wish.gpus, device=wish.device
        )
        if found:
            if answer is not None:
                origins["training.global_batch_size"] = (
                    f"law of the best batch, {answer[0]:.3g} tokens ({answer[1]:.2g} to {answer[2]:.2g}, 90 %), "
                    f"rounded by {size / wanted - 1:+.1%} to what {wish.gpus} devices share"
                )
                if abs(size / wanted - 1) > _ROUNDING:
                    warnings.append(
                        f"the batch is {size / wanted:.2f} times the best: {wish.gpus} devices share no nearer one"
                    )
            return found[0]
    least = min((one.need_gib for one in rejected if one.need_gib is not None), default=None)
    why = (
        f"the least needs {least:.0f} GiB" if least is not None else rejected[0].reason if rejected else "none is legal"
    )
    fix = f"x {wish.device.name} have no layout for {params:.3g} parameters: {why}; use another number."
    raise ConfigError(Problem("--gpus", wish.gpus, fix))


def _legal_sizes(wanted: float, gpus: int) -> list[int]:
    """Global batches near the best one: the nearest multiple of as many devices as it can be shared by, then fewer."""
    sizes, share = [], gpus
    while share >= 1:
        size = max(1, round(wanted / share)) * share
        sizes.append((abs(math.log(size / wanted)) > _ROUNDING, size))
        share = share // 2 if share % 2 == 0 else (1 if share > 1 else 0)
    # Those near enough first, the widest shared first; then the others, the nearest first.
    near = [size for far, size in sizes if not far]
    return list(
        dict.fromkeys([*near, *sorted((size for far, size in sizes if far), key=lambda s: abs(math.log(s / wanted)))])
    )


def _loss(fit: FitFile, point: Points, warnings: list[str]) -> tuple[float | None, tuple[float, float] | None]:
    if fit.surface is None:
        warnings.append("the fit has no law of the loss: none is predicted")
        return None, None
    if why := _another_kind(fit, point):
        warnings.append(f"{why}: no loss is predicted, and the laws of the settings are of other models")
        return None, None
    found = predict(fit.surface, fit.basin, point)
    return found.value, found.interval


def _another_kind(fit: FitFile, point: Points) -> str | None:
    """Why the law does not speak of this model, or None."""
    for name, what, of in (
        ("sparsity", "all parameters over active ones", "sigma"),
        ("granularity", "granularity", "gamma"),
    ):
        value, fitted = float(getattr(point, name)[0]), getattr(fit.points, name)
        low, high = float(fitted.min()), float(fitted.max())
        known = fit.surface is not None and of in fit.surface.names
        if not known and abs(math.log(value / float(np.median(fitted)))) > _ROUNDING:
            return f"{what} of {value:.3g} was not varied in the study ({low:.3g} to {high:.3g})"
        if not low / 2 <= value <= high * 2:
            return f"{what} of {value:.3g} lies outside the {low:.3g} to {high:.3g} of the study"
    return None
