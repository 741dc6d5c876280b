"""The command line of ``mq sweep``."""

import argparse
from pathlib import Path
from typing import Any

from megatron_qwen.cli import Parser

# Defaults where neither the command line nor an earlier submission of the study gives a value. AT_ONCE by scheduler:
# runs on one machine share its cores, so one at a time; on a cluster they queue.
NODES = 1
AT_ONCE = {"local": 1, "slurm": 32}
RUNS = Path("runs")


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
            "mq sweep report runs/study",
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
    plan.add_argument(
        "--output", type=Path, help="where the plan is written; default: next to the study as NAME.plan.yaml"
    )
    plan.add_argument("--json", action="store_true")
    _add_running(actions)
    _add_fitting(actions)
    _add_prescribe(actions)
    return parser


def _add_fitting(actions: Any) -> None:
    """What reads a study, or a CSV."""
    fit = actions.add_parser(
        "fit",
        description="Fits learning rate, batch and loss over model size and tokens, with intervals and the error of "
        "predicting the largest size from the others.",
        examples=[
            "mq sweep fit runs/study",
            "mq sweep fit runs.csv",
            "mq sweep fit runs.csv --embeddings in --draws 4000 --json",
            "mq sweep fit runs/study --metric eval/arc_easy/gold_bits_per_byte --predict 7e9,1e12",
        ],
        help="laws from a study or a CSV",
    )
    fit.add_argument(
        "source",
        type=Path,
        help="the directory of a study, or a CSV with params, tokens, loss, and as far as known learning_rate, "
        "batch_tokens, status, embedding_params, total_params, granularity, name",
    )
    _add_columns(fit)
    fit.add_argument("--output", type=Path, help="where the fit is written; default: next to the CSV as NAME.fit.json")
    fit.add_argument(
        "--embeddings", choices=["out", "in"], default="out", help="whether N counts embeddings (%(default)s)"
    )
    fit.add_argument("--draws", type=int, default=1000, help="bootstrap resamples behind every interval (%(default)s)")
    fit.add_argument("--seed", type=int, default=0, help="seed of the resamples (%(default)s)")
    fit.add_argument("--delta", type=float, default=1e-3, help="threshold of the Huber loss of ln L (%(default)g)")
    within = "how far above the best, in ln L, settings are described by a quadratic (%(default)g)"
    fit.add_argument("--window", type=float, default=0.01, help=within)
    fit.add_argument(
        "--metric",
        metavar="NAME",
        help="a metric of the runs' last step instead of the loss, such as eval/arc_easy/gold_bits_per_byte",
    )
    at = "say what the law gives for a model of this size, counted as --embeddings says, and so many tokens"
    fit.add_argument("--predict", action="append", default=[], metavar="PARAMS,TOKENS", help=at)
    fit.add_argument(
        "--score",
        metavar="NAME",
        help="with --predict: a share of right answers as well (eval/arc_easy/acc_norm), from the metric by a sigmoid",
    )
    fit.add_argument("--json", action="store_true")
    report = actions.add_parser(
        "report",
        description="Fits the finished cells and writes one page that needs no network: laws, charts, cells with links "
        "to their runs, failed runs and hours spent; next to it the charts as SVG and PNG and the data as CSV.",
        examples=["mq sweep report runs/study", "mq sweep report runs.csv --output report.html --figures figures"],
        help="a page of a study",
    )
    report.add_argument("source", type=Path, help="the directory of a study, or a CSV as for fit")
    _add_columns(report)
    report.add_argument("--output", type=Path, help="the page; report.html of the study, NAME.report.html for a CSV")
    report.add_argument("--figures", type=Path, help="folder of charts and data; figures of the study, NAME.figures")
    report.add_argument(
        "--fit", type=Path, help="use the settings of this fit if it exists; default: fit.json, NAME.fit.json"
    )
    report.add_argument(
        "--standalone", action="store_true", help="no links to runs: for a page that is published without them"
    )


def _add_columns(parser: Any) -> None:
    parser.add_argument(
        "--columns",
        action="append",
        default=[],
        metavar="NAME=COLUMN",
        help="what a column of the CSV is, such as params=N,tokens=D,loss=val_loss; case counts only where the CSV has "
        "two columns that differ in nothing else",
    )


def _add_prescribe(actions: Any) -> None:
    """What turns a fit into a run."""
    prescribe = actions.add_parser(
        "prescribe",
        description="The run.yaml for a size and its tokens, or for a budget: shape, learning rate, batch, layout and "
        "predicted loss, each number with its origin.",
        examples=["mq sweep prescribe fit.json --params 7e9 --tokens 1e12 --recipe qwen2_5_7b --gpus 512 --gpu h100"],
        help="a run.yaml from a fit",
    )
    prescribe.add_argument("fit", type=Path, help="what mq sweep fit has written")
    prescribe.add_argument("--recipe", required=True, help="recipe or run.yaml of the family; then section.field=value")
    prescribe.add_argument("--params", type=float, help="parameters, counted as the fit counts them")
    prescribe.add_argument("--tokens", type=float, help="tokens to train on")
    prescribe.add_argument("--gpu-hours", type=float, help="a budget, instead of --params and --tokens")
    prescribe.add_argument("--gpus", type=int, required=True, help="devices")
    prescribe.add_argument(
        "--gpu", default="h100", help="kind of device, or a file that mq bench peaks wrote (%(default)s)"
    )
    beyond = "compute over the largest fitted one that is refused (%(default)g)"
    prescribe.add_argument("--refuse-factor", type=float, default=1000.0, help=beyond)
    prescribe.add_argument("--output", type=Path, help="where run.yaml is written; it is printed otherwise")
    prescribe.add_argument("--json", action="store_true")


def _add_running(actions: Any) -> None:
    """What runs a study."""
    submit = actions.add_parser(
        "submit",
        description="Runs a plan to its end: submits runs that are ready, a few at a time, and branches once their "
        "stem has written their checkpoint; records the result of each. After a kill, `resume` continues; running "
        "jobs are not disturbed.",
        examples=["mq sweep submit study.plan.yaml", "mq sweep submit study.plan.yaml --cluster cpu --at-once 8"],
        help="run a plan",
    )
    submit.add_argument("plan", type=Path, help="what mq sweep plan has written")
    submit.add_argument("--study", type=Path, help=f"its directory ({RUNS}/ and the name of the plan)")
    resume = actions.add_parser(
        "resume",
        description="Resumes a study whose controller has ended, on the same cluster as before unless told "
        "otherwise. Runs that were refused, or whose jobs were lost, are tried again.",
        examples=["mq sweep resume runs/study"],
        help="resume a study",
    )
    resume.add_argument("study", type=Path, help="the directory of the study")
    for each in (submit, resume):
        each.add_argument("--cluster", help="name or path of a cluster file, as for mq launch submit")
        each.add_argument("--nodes", type=int, help=f"of a run ({NODES})")
        each.add_argument("--ranks-per-node", type=int, help="default: the cluster's")
        together = f"runs pending or running at once ({AT_ONCE['local']}; on Slurm {AT_ONCE['slurm']})"
        each.add_argument("--at-once", type=int, help=together)
        each.add_argument("--poll", type=float, default=10.0, help="seconds between checks (%(default)g)")
    status = actions.add_parser(
        "status",
        description="State of every run of a study, from its directory and the scheduler.",
        examples=["mq sweep status runs/study", "mq sweep status runs/study --json"],
        help="state of a study",
    )
    status.add_argument("study", type=Path, help="the directory of the study")
    status.add_argument("--json", action="store_true")
