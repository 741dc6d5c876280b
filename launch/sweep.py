"""``mq sweep``: scaling-law studies."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_qwen.cli import Parser, run_program
from megatron_qwen.config.source import resolve
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.estimate.hardware_file import find_hardware
from megatron_qwen.estimate.speed import why_not
from megatron_qwen.recipes.registry import RECIPES

_TAKES_OVERRIDES = ("prescribe",)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        "mq sweep",
        description="Scaling laws: plans a study under a budget, runs it, fits what trained models have shown, and "
        "prescribes the run of a larger one.",
        examples=[
            "mq sweep plan study.yaml",
            "mq sweep submit study.plan.yaml --at-once 2",
            "mq sweep status runs/study",
            "mq sweep fit runs/study",
            "mq sweep fit runs.csv --output fit.json",
            "mq sweep prescribe fit.json --params 7e9 --tokens 1e12 --recipe qwen2_5_7b --gpus 512 --output run.yaml",
            "mq sweep prescribe fit.json --gpu-hours 20000 --recipe qwen2_5_7b --gpus 64 --gpu h200",
        ],
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    plan = actions.add_parser(
        "plan",
        description="Expands a study into cells with parameters, FLOPs, hours, memory and a legal layout each, drops "
        "what its budget does not allow, and writes the plan for review.",
        examples=["mq sweep plan study.yaml", "mq sweep plan study.yaml --output plan.yaml --json"],
        help="the cells of a study and what they cost",
    )
    plan.add_argument("study", type=Path, help="a study file (docs/scaling_laws.md)")
    plan.add_argument("--output", type=Path, help="where the plan is written; beside the study as NAME.plan.yaml")
    plan.add_argument("--json", action="store_true")
    _add_running(actions)
    fit = actions.add_parser(
        "fit",
        description="Fits learning rate, batch and loss over model size and tokens, with intervals and the error of "
        "predicting the largest size from the others.",
        examples=[
            "mq sweep fit runs/study",
            "mq sweep fit runs.csv",
            "mq sweep fit runs.csv --embeddings in --draws 4000 --json",
        ],
        help="laws from a study or a CSV",
    )
    fit.add_argument(
        "source",
        type=Path,
        help="the directory of a study, or a CSV with params, tokens, loss, and as far as known learning_rate, "
        "batch_tokens, status, embedding_params, total_params, granularity, name",
    )
    fit.add_argument("--output", type=Path, help="where the fit is written; beside the CSV as NAME.fit.json")
    fit.add_argument("--embeddings", choices=["out", "in"], default="out", help="whether N counts embeddings (out)")
    fit.add_argument("--draws", type=int, default=1000, help="versions of the data behind every interval (1000)")
    fit.add_argument("--seed", type=int, default=0, help="of their drawing (0)")
    fit.add_argument("--delta", type=float, default=1e-3, help="of the Huber loss of ln L (0.001)")
    within = "how far above the best, in ln L, settings are described by a quadratic (0.01)"
    fit.add_argument("--window", type=float, default=0.01, help=within)
    fit.add_argument("--json", action="store_true")
    prescribe = actions.add_parser(
        "prescribe",
        description="The run.yaml for a size and its tokens, or for a budget: shape, learning rate, batch, layout and "
        "predicted loss, every number with its origin.",
        examples=["mq sweep prescribe fit.json --params 7e9 --tokens 1e12 --recipe qwen2_5_7b --gpus 512 --gpu h100"],
        help="a run.yaml from a fit",
    )
    prescribe.add_argument("fit", type=Path, help="what mq sweep fit has written")
    prescribe.add_argument("--recipe", required=True, help="recipe or run.yaml of the family; then section.field=value")
    prescribe.add_argument("--params", type=float, help="parameters, counted as the fit counts them")
    prescribe.add_argument("--tokens", type=float, help="tokens to train on")
    prescribe.add_argument("--gpu-hours", type=float, help="a budget, instead of --params and --tokens")
    prescribe.add_argument("--gpus", type=int, required=True, help="devices")
    prescribe.add_argument("--gpu", default="h100", help="kind of device, or a file that mq bench ceilings wrote")
    beyond = "compute over the largest fitted one that is refused (1000)"
    prescribe.add_argument("--refuse-factor", type=float, default=1000.0, help=beyond)
    prescribe.add_argument("--output", type=Path, help="where run.yaml is written; it is printed otherwise")
    prescribe.add_argument("--json", action="store_true")
    return parser


def _add_running(actions: Any) -> None:
    """What runs a study."""
    submit = actions.add_parser(
        "submit",
        description="Runs a plan to its end: hands over what is ready, a few runs at a time, branches once their stem "
        "has come so far, and notes what became of each. Killed, `resume` goes on; jobs under way are not disturbed.",
        examples=["mq sweep submit study.plan.yaml", "mq sweep submit study.plan.yaml --cluster cpu --at-once 8"],
        help="run a plan",
    )
    submit.add_argument("plan", type=Path, help="what mq sweep plan has written")
    submit.add_argument("--study", type=Path, help="its directory (runs/ and the name of the plan)")
    resume = actions.add_parser(
        "resume",
        description="Goes on with a study whose controller has ended, where its runs went before unless told "
        "otherwise. Runs that were refused, or whose jobs were lost, are tried again.",
        examples=["mq sweep resume runs/study"],
        help="go on with a study",
    )
    resume.add_argument("study", type=Path, help="the directory of the study")
    for each in (submit, resume):
        each.add_argument("--cluster", help="name or path of a cluster file, as for mq launch submit")
        each.add_argument("--nodes", type=int, help="of a run (1)")
        each.add_argument("--ranks-per-node", type=int, help="instead of the cluster's")
        each.add_argument("--at-once", type=int, help="runs that may wait or run together (1)")
        each.add_argument("--poll", type=float, default=10.0, help="seconds between looks (10)")
    status = actions.add_parser(
        "status",
        description="How every run of a study stands, from its directory and the scheduler.",
        examples=["mq sweep status runs/study", "mq sweep status runs/study --json"],
        help="how a study stands",
    )
    status.add_argument("study", type=Path, help="the directory of the study")
    status.add_argument("--json", action="store_true")


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
        "prescribe": _prescribe,
    }
    return actions[options.action](options, overrides)


def _plan(options: argparse.Namespace, _: list[str]) -> int:
    output = options.output or options.study.with_suffix(".plan.yaml")
    if not output.parent.is_dir():
        raise ConfigError(Problem("--output", output, "lies in a folder that does not exist; make it first."))
    from tools.scaling import plan
    from tools.scaling.study import read_study

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
    from launch.sweeps.controller import Controller, table
    from launch.sweeps.database import Database
    from launch.sweeps.study_directory import StudyDirectory
    from tools.scaling.plan_file import read_plan

    if options.action == "submit":
        plan = read_plan(options.plan)
        study = StudyDirectory(options.study or Path("runs") / str(plan.content["name"]))
        study.claim(plan)
    else:
        study = StudyDirectory(options.study)
        study.plan()
    database = Database(study.database)
    try:
        database.take()
        place = _place(options, database.remember())
        database.remember(json.dumps(asdict(place)))
        if options.action == "resume":
            database.try_again()
        controller = Controller(study, database, place, lambda line: print(line, flush=True))
        try:
            rows = controller.run(poll_s=options.poll)
        finally:
            database.leave()
    finally:
        database.close()
    print(table(rows, "has ended", study.path))
    return 1 if any(row.status == "failed" for row in rows.values()) else 0


def _place(options: argparse.Namespace, kept: str | None) -> Any:
    """What is typed, else where the study's runs went so far, else one run at a time on one node."""
    from launch.sweeps.controller import Place

    fields = ("cluster", "nodes", "ranks_per_node", "at_once")
    standing = {"cluster": None, "nodes": 1, "ranks_per_node": None, "at_once": 1} | json.loads(kept or "{}")
    typed = {name: value for name in fields if (value := getattr(options, name)) is not None}
    return Place(**(standing | typed))


def _status(options: argparse.Namespace, _: list[str]) -> int:
    from launch.sweeps.controller import look, table
    from launch.sweeps.database import Database
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
    problems = [
        Problem(f"--{name}", value, "must be above 0.")
        for name, value in (("draws", options.draws), ("delta", options.delta), ("window", options.window))
        if not 0 < value < float("inf")
    ]
    if options.seed < 0:
        problems.append(Problem("--seed", options.seed, "must be at least 0."))
    source: Path = options.source
    output = options.output or (source / "fit.json" if source.is_dir() else source.with_suffix(".fit.json"))
    if not output.parent.is_dir():
        problems.append(Problem("--output", output, "lies in a folder that does not exist; make it first."))
    if problems:
        raise ConfigError(problems)
    from tools.scaling import fit_file
    from tools.scaling.fit import Settings, fit

    observations, notes = _observations(source)
    settings = Settings(options.embeddings == "in", options.draws, options.seed, options.delta, options.window)
    content = fit_file.document(fit(observations, settings), source=str(source.absolute()))
    content["notes"] = [*notes, *content["notes"]]
    fit_file.write(output, content)
    if options.json:
        print(json.dumps(content, indent=1))
    else:
        print(fit_file.table(content), f"written: {output}", sep="\n")
    return 0


def _observations(source: Path) -> tuple[list[Any], list[str]]:
    """Of a study's runs, which are also written beside its plan as a CSV; or of a CSV."""
    from launch.sweeps.controller import ENDED, look
    from launch.sweeps.study_directory import StudyDirectory
    from tools.scaling.observations import read_csv, write_csv
    from tools.scaling.plan_file import measured, observe

    if not source.is_dir():
        return read_csv(source), []
    study = StudyDirectory(source)
    plan = study.plan()
    observations, outcomes = observe(plan, study.runs)
    # What never began has no directory: its stem diverged, or it was refused.
    rows = look(study, study.all_runs(plan), _noted(study), ask=False)
    never = {name: row.status for name, row in rows.items() if row.status in ENDED}
    observations = [replace(one, status=never.get(one.name, one.status)) for one in observations]
    write_csv(study.path / "observations.csv", observations)
    kind = measured(outcomes)
    return observations, [f"losses are {kind}"] if kind else []


def _noted(study: Any) -> dict[str, Any]:
    """What the study's database says; nothing where there is none."""
    from launch.sweeps.database import Database

    if not study.database.is_file():
        return {}
    database = Database(study.database)
    try:
        return database.rows()
    finally:
        database.close()


def _prescribe(options: argparse.Namespace, overrides: list[str]) -> int:
    _require_wish(options)
    base = resolve(options.recipe, overrides, RECIPES)
    device = find_hardware(options.gpu)
    if reason := why_not(base, device):
        raise ConfigError(Problem(base.recipe, None, reason))
    if base.data.blend is not None:
        raise ConfigError(Problem("data.blend", base.data.blend, "has stages of its own; prescribe a run without one."))
    from tools.scaling.fit_file import FitFile
    from tools.scaling.prescribe import Wish, prescribe

    wish = Wish(base, options.params, options.tokens, options.gpu_hours, options.gpus, device, options.refuse_factor)
    found = prescribe(FitFile(options.fit), wish)
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
        problems.append(Problem("mq sweep prescribe", None, "needs --params and --tokens, or --gpu-hours alone."))
    if problems:
        raise ConfigError(problems)


def _document(found: Any) -> dict[str, Any]:
    return {
        "params": found.params,
        "tokens": found.tokens,
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
    loss = "is not predicted"
    if found.loss is not None:
        loss = f"is predicted as {found.loss:.4f} ({found.interval[0]:.4f} to {found.interval[1]:.4f})"
    return "\n".join(
        [
            f"N {found.params:.4g}, D {found.tokens:.4g}: {model.num_layers} layers, hidden {model.hidden_size}, "
            f"FFN {model.ffn_hidden_size}",
            f"learning rate {optim.learning_rate:.3g}, {training.global_batch_size} sequences a step "
            f"({step:.3g} tokens), {training.train_iters} steps",
            f"loss {loss}; {found.hours:.3g} h at {found.layout.tokens_per_second:,.0f} tokens/s a device",
            f"written: {output}",
        ]
    )


if __name__ == "__main__":
    run_program(main)
