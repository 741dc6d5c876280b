"""``mq sweep``: scaling-law studies."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.sweeps.arguments import NODES, RUNS, parser
from megatron_qwen.cli import run_program
from megatron_qwen.config.source import resolve
from megatron_qwen.errors import ConfigError, DataError, Problem
from megatron_qwen.estimate.hardware_file import find_hardware
from megatron_qwen.estimate.speed import why_not
from megatron_qwen.recipes.registry import RECIPES

_TAKES_OVERRIDES = ("prescribe",)


def main(arguments: Sequence[str]) -> int:
    """Does what was asked for."""
    options, overrides = parser().parse_known_args(arguments)
    if overrides and options.action not in _TAKES_OVERRIDES:
        raise ConfigError(f"unrecognized arguments: {' '.join(overrides)}. See mq sweep {options.action} --help.")
    actions: dict[str, Callable[[argparse.Namespace, list[str]], int]] = {
        "plan": _plan,
        "submit": _submit,
        "resume": _submit,
        "status": _status,
        "fit": _fit,
        "report": _report,
        "prescribe": _prescribe,
    }
    return actions[options.action](options, overrides)


def _plan(options: argparse.Namespace, _: list[str]) -> int:
    output = options.output or options.study.with_suffix(".plan.yaml")
    if not output.parent.is_dir():
        raise ConfigError(Problem("--output", output, "is in a folder that does not exist; create it first."))
    from launch.sweeps import plan
    from launch.sweeps.study import read_study

    content = plan.document(plan.make_plan(read_study(options.study)))
    plan.write(output, content)
    if options.json:
        print(json.dumps(content, indent=1))
    else:
        print(plan.table(content), f"written: {output}", sep="\n")
    return 0


def _submit(options: argparse.Namespace, _: list[str]) -> int:
    """Exit 1 where a run failed; one that diverged is a result."""
    problems = [
        Problem(f"--{name.replace('_', '-')}", value, "must be above 0.")
        for name in ("nodes", "ranks_per_node", "at_once", "poll")
        if (value := getattr(options, name)) is not None and not 0 < value < float("inf")
    ]
    if problems:
        raise ConfigError(problems)
    from launch.sweeps.plan_file import read_plan
    from launch.sweeps.study_directory import StudyDirectory

    if options.action == "submit":
        plan = read_plan(options.plan)
        study = StudyDirectory(options.study or RUNS / str(plan.content["name"]))
        study.claim(plan)
    else:
        study = StudyDirectory(options.study)
        study.plan()
    with study.alone():
        return _run(options, study)


def _run(options: argparse.Namespace, study: Any) -> int:
    """As the study's one controller on this file system."""
    from launch.sweeps.controller import StudyController
    from launch.sweeps.database import Database
    from launch.sweeps.look import table

    database = Database(study.database)
    try:
        database.take()
        try:
            place = _place(options, database.remember())
            controller = StudyController(study, database, place, lambda line: print(line, flush=True))
            database.remember(json.dumps(asdict(place)))
            if options.action == "resume":
                database.try_again()
            rows = controller.run(poll_s=options.poll)
        finally:
            database.leave()
    finally:
        database.close()
    print(table(rows, "has ended", study.path))
    return 1 if any(row.status == "failed" for row in rows.values()) else 0


def _place(options: argparse.Namespace, kept: str | None) -> Any:
    """What is typed, else where the study's runs went so far, else a node a run and as many as the scheduler takes."""
    from launch.sweeps.handover import Place

    fields = ("cluster", "nodes", "ranks_per_node", "at_once")
    standing = {"cluster": None, "nodes": NODES, "ranks_per_node": None, "at_once": None} | json.loads(kept or "{}")
    typed = {name: value for name in fields if (value := getattr(options, name)) is not None}
    return Place(**(standing | typed))


def _status(options: argparse.Namespace, _: list[str]) -> int:
    from launch.sweeps.database import Database
    from launch.sweeps.look import look, table
    from launch.sweeps.study_directory import StudyDirectory

    study = StudyDirectory(options.study)
    plan = study.plan()
    database = Database(study.database)
    try:
        rows, controller = look(study, study.all_runs(plan), database.rows()), database.controller()
    finally:
        database.close()
    if options.json:
        print(json.dumps({"controller": controller, "runs": [asdict(row) for row in rows.values()]}, indent=1))
    else:
        print(table(rows, controller, study.path))
    return 0


def _fit(options: argparse.Namespace, _: list[str]) -> int:
    from launch.sweeps.fitting import fit_command

    return fit_command(options)


def _report(options: argparse.Namespace, _: list[str]) -> int:
    """Fits again with the settings of the existing fit, so that page and fit agree. Without a law no fit is written."""
    from launch.sweeps.fit_paths import beside
    from launch.sweeps.fitting import has_law

    page = options.output or beside(options.source, "report.html")
    figures = options.figures or beside(options.source, "figures")
    fit_json = options.fit or beside(options.source, "fit.json")
    problems = [
        Problem(name, path, "is in a folder that does not exist; create it first.")
        for name, path in (("--output", page), ("--fit", fit_json))
        if not path.parent.is_dir()
    ]
    if problems:
        raise ConfigError(problems)
    from launch.sweeps import results
    from tools.scaling import fit_file
    from tools.scaling.csv_table import column_names
    from tools.scaling.fit import Settings, fit
    from tools.scaling.observations import COLUMNS, DONE
    from tools.scaling.report import content, write

    earlier = fit_file.FitFile(fit_json) if fit_json.is_file() else None
    settings, metric = (earlier.settings, earlier.metric) if earlier is not None else (Settings(), None)
    found = results.read(options.source, column_names(options.columns, COLUMNS), metric=metric)
    fitted, document = None, {}
    notes = [*found.notes, "no cell is done yet: there is nothing to fit"]
    if any(one.status == DONE for one in found.observations):
        fitted = fit(found.observations, settings)
        document = fit_file.document(fitted, source=str(options.source.absolute()), metric=metric)
        no_law = [] if has_law(fitted) else [_no_law(fit_json)]
        document["notes"] = notes = [*found.notes, *no_law, *document["notes"]]
        if not no_law:
            fit_file.write(fit_json, document)
    links = {} if options.standalone else content.links(found, page)
    shown = content.Content(found, fitted, document, notes, links)
    written = write.write(shown, page, figures)
    if document:
        print(fit_file.table(document))
        written += [fit_json] if has_law(fitted) else []
    print("\n".join(f"written: {path}" for path in written))
    return 0


def _no_law(fit_json: Path) -> str:
    """Says in page and output that there is no law, and that no run can be prescribed from this report."""
    kept = f"; {fit_json.name}, of an earlier fit, is left as it was" if fit_json.is_file() else ""
    return f"the observations determine no law, and no fit is written{kept}"


def _prescribe(options: argparse.Namespace, overrides: list[str]) -> int:
    _require_wish(options)
    base = resolve(options.recipe, overrides, RECIPES)
    device = find_hardware(options.gpu)
    if reason := why_not(base, device):
        raise ConfigError(Problem(base.recipe, None, reason))
    if base.data.blend is not None:
        raise ConfigError(
            Problem(
                "data.blend",
                base.data.blend,
                "has data stages, which a prescription cannot set; use a run without a blend.",
            )
        )
    from launch.sweeps.fitting import has_law
    from tools.scaling.fit_file import FitFile
    from tools.scaling.prescribe import Wish, prescribe

    wish = Wish(base, options.params, options.tokens, options.gpu_hours, options.gpus, device, options.refuse_factor)
    fit = FitFile(options.fit)
    if not has_law(fit):
        raise DataError(Problem(str(options.fit), None, "holds no law: nothing follows from it; fit more runs."))
    found = prescribe(fit, wish)
    text = found.yaml()
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if options.json:
        print(json.dumps(_document(found), indent=1))
    elif options.output is None:
        print(text, end="")
    else:
        print(_summary(found, options.output))
    return 0


def _require_wish(options: argparse.Namespace) -> None:
    problems = [
        Problem(f"--{name.replace('_', '-')}", value, "must be a number above 0.")
        for name in ("params", "tokens", "gpu_hours", "gpus", "refuse_factor")
        if (value := getattr(options, name)) is not None and not 0 < value < float("inf")
    ]
    sized = options.params is not None and options.tokens is not None
    if (options.gpu_hours is None) != sized or (options.gpu_hours is not None and (options.params or options.tokens)):
        problems.append(Problem("mq sweep prescribe", None, "requires --params and --tokens, or --gpu-hours alone."))
    if problems:
        raise ConfigError(problems)


def _document(found: Any) -> dict[str, Any]:
    return {
        "params": found.params,
        "tokens": found.tokens,
        "metric": found.metric,
        "loss": found.loss,
        "interval": found.interval,
        "hours": found.hours,
        "beyond": found.beyond,
        "warnings": found.warnings,
        "origins": found.origins,
        "tokens_per_second_per_device": found.layout.tokens_per_second,
        "memory_gib": found.layout.memory_gib,
        "run_yaml": found.yaml(),
    }


def _summary(found: Any, output: Path) -> str:
    model, optim, training = found.config.model, found.config.optim, found.config.training
    step = training.global_batch_size * found.config.data.seq_length
    loss, what = "is not predicted", found.metric or "loss"
    if found.loss is not None:
        loss = f"is predicted as {found.loss:.4f} ({found.interval[0]:.4f} to {found.interval[1]:.4f})"
    return "\n".join(
        [
            f"N {found.params:.4g}, D {found.tokens:.4g}: {model.num_layers} layers, hidden {model.hidden_size}, "
            f"FFN {model.ffn_hidden_size}",
            f"learning rate {optim.learning_rate:.3g}, {training.global_batch_size} sequences per step "
            f"({step:.3g} tokens), {training.train_iters} steps",
            f"{what} {loss}; {found.hours:.3g} h at {found.layout.tokens_per_second:,.0f} tokens/s per device",
            f"written: {output}",
        ]
    )


if __name__ == "__main__":
    run_program(main)
