"""``mq sweep fit``: laws of a study or a CSV, of the loss or of a score, and what they predict."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.sweeps.fit_paths import beside
from megatron_qwen.errors import ConfigError, DataError, Problem

_BEYOND = 1000.0  # times the largest fitted N D, from where on nothing is predicted; as of mq sweep prescribe


def fit_command(options: argparse.Namespace) -> int:
    """Fits, writes and prints."""
    output = options.output or beside(options.source, "fit.json", options.metric)
    targets = _check(options, output)
    from launch.sweeps import results
    from tools.scaling import fit_file
    from tools.scaling.csv_table import column_names
    from tools.scaling.fit import Settings, fit
    from tools.scaling.observations import COLUMNS

    columns = column_names(options.columns, COLUMNS)
    found = results.read(options.source, columns, metric=options.metric, score=options.score)
    settings = Settings(options.embeddings == "in", options.draws, options.seed, options.delta, options.window)
    fitted = fit(found.observations, settings)
    if not has_law(fitted):
        fix = f"determine no law: {'; '.join(fitted.notes)}."
        raise DataError(Problem(str(options.source), f"{len(found.observations)} observations", fix))
    content = fit_file.document(fitted, source=str(options.source.absolute()), metric=options.metric)
    content["notes"] = [*found.notes, *content["notes"]]
    content["predictions"] = _predictions(fitted, found.observations, found.scores, targets, options)
    fit_file.write(output, content)
    if options.json:
        print(json.dumps(content, indent=1))
    else:
        print(fit_file.table(content), f"written: {output}", sep="\n")
    return 0


def has_law(fit: Any) -> bool:
    """Whether something follows from a fit, or from its file."""
    return fit.surface is not None or fit.basin is not None


def _check(options: argparse.Namespace, output: Path) -> list[tuple[float, float]]:
    problems = [
        Problem(f"--{name}", value, "must be above 0.")
        for name, value in (("draws", options.draws), ("delta", options.delta), ("window", options.window))
        if not 0 < value < float("inf")
    ]
    if options.seed < 0:
        problems.append(Problem("--seed", options.seed, "must be at least 0."))
    if not output.parent.is_dir():
        problems.append(Problem("--output", output, "is in a folder that does not exist; create it first."))
    for name in ("metric", "score"):
        if getattr(options, name) is not None and not options.source.is_dir():
            fix = "names a metric of a study's runs; of a CSV say which column it is: --columns loss=COLUMN."
            problems.append(Problem(f"--{name}", getattr(options, name), fix))
    if options.score is not None and not options.predict:
        problems.append(
            Problem("--score", options.score, "is predicted from the metric: say for what (--predict PARAMS,TOKENS).")
        )
    targets = []
    for text in options.predict:
        try:
            params, tokens = (float(part) for part in text.split(","))
            if not (0 < params < float("inf") and 0 < tokens < float("inf")):
                raise ValueError
            targets.append((params, tokens))
        except ValueError:
            problems.append(Problem("--predict", text, "must be two numbers above 0: parameters,tokens (7e9,1e12)."))
    if problems:
        raise ConfigError(problems)
    return targets


def _predictions(
    fit: Any,
    observations: Sequence[Any],
    scores: Mapping[str, float],
    targets: Sequence[tuple[float, float]],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Value, and score if one is asked for, of each target."""
    if not targets:
        return []
    if fit.surface is None:
        fix = "requires a law over N and D, which these observations do not determine; see the notes of the fit."
        raise DataError(Problem("--predict", options.predict[0], fix))
    from tools.scaling.predict import point_of, predict
    from tools.scaling.score_link import link

    known = [one for one in observations if one.name in scores]
    sigmoid = link([one.loss for one in known], [scores[one.name] for one in known]) if scores else None
    largest = float((fit.points.params * fit.points.tokens).max())
    made = []
    for params, tokens in targets:
        beyond = params * tokens / largest
        if not 1 / _BEYOND <= beyond <= _BEYOND:
            fix = f"is {beyond:.3g} times the compute of the largest fitted point: a fit is not reliable there."
            raise ConfigError(Problem("--predict", f"{params:g},{tokens:g}", fix))
        found = predict(fit.surface, fit.basin, point_of(fit.points, params, tokens))
        one: dict[str, Any] = {"params": params, "tokens": tokens, "beyond": beyond}
        one |= {"value": found.value, "interval": list(found.interval)}
        if sigmoid is not None:
            score = {"value": sigmoid.score(found.value), "interval": list(sigmoid.interval(found.draws))}
            one |= {"score": {"name": options.score, "models": len(known), **score}}
        made.append(one)
    return made
