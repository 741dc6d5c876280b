"""The command line of ``mq launch``; imports nothing heavy, so that --help answers at once."""

import argparse
from pathlib import Path

from megatron_qwen.cli import Parser

TAKES_OVERRIDES = ("submit", "dry-run", "array", "freeze")
DEFAULT_RUNS = Path("runs")
_NEW_CODE = "replace what the run was submitted with, its code and its packages, by what is here now"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        "mq launch",
        description="Submits runs to Slurm (or to this machine), shows how they are, and steers them. docs/slurm.md is "
        "for a cluster's first day.",
        examples=[
            "mq launch cluster-init > launch/clusters/ours.yaml",
            "mq launch dry-run qwen2_5_7b data.path=data/corpus --cluster ours --nodes 16",
            "mq launch submit qwen2_5_7b data.path=data/corpus --cluster ours --nodes 16 --name 7b-first",
            "mq launch status runs --watch",
            "mq launch logs runs/7b-first --rank 0 --follow",
        ],
    )
    actions = parser.add_subparsers(dest="action", required=True)
    _submit_parser(actions)
    _dry_run_parser(actions)
    _array_parser(actions)
    _status_parser(actions)
    _logs_parser(actions)
    _steering_parsers(actions)
    _nodes_parser(actions)
    _site_parsers(actions)
    return parser


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a recipe (mq recipes) or a run.yaml; then section.field=value overrides")
    _job_options(parser)
    parser.add_argument("--name", help="of the run; default: the recipe's")
    parser.add_argument("--run-dir", type=Path, help="default: the cluster's run_root and the name")
    many = parser.add_mutually_exclusive_group()
    many.add_argument(
        "--chain", type=int, help="submit this many jobs in a row, for sites where a job may not requeue itself"
    )
    many.add_argument(
        "--until-done", action="store_true", help="one job that requeues itself until the run is done (the default)"
    )


def _job_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=1, help="of a job (%(default)s)")
    parser.add_argument(
        "--spares", type=int, default=0, help="further nodes of a job that replace those that fail (%(default)s)"
    )
    parser.add_argument("--cluster", help="name of a file in launch/clusters, or a path")
    parser.add_argument("--ranks-per-node", type=int, help="default: the cluster's, one per GPU")
    parser.add_argument("--time-limit", help="of a job, D-HH:MM:SS; default: the cluster's")


def _submit_parser(actions: "argparse._SubParsersAction[Parser]") -> None:
    parser = actions.add_parser(
        "submit",
        help="check a run and hand it to the cluster",
        description="Checks everything that can be checked without a GPU, freezes configuration and code in the run "
        "directory, and submits. The same command resumes a run that stopped; a run of another configuration is "
        "refused. Without --cluster: this machine where there is no Slurm, else the example cluster.",
        examples=[
            "mq launch submit qwen2_5_7b data.path=/data/corpus --cluster ours --nodes 16 --name 7b-first",
            "mq launch submit runs/7b-first/run.yaml training.train_iters=200000 --cluster ours --nodes 16",
            "mq launch submit qwen2_5_72b data.path=/data/corpus --cluster ours --nodes 128 --chain 14",
            "mq launch submit tiny_dense data.path=data/corpus --cluster local",
        ],
    )
    _run_options(parser)
    parser.add_argument("--new-code", action="store_true", help=_NEW_CODE)
    parser.add_argument("--json", action="store_true")


def _dry_run_parser(actions: "argparse._SubParsersAction[Parser]") -> None:
    parser = actions.add_parser(
        "dry-run",
        help="show everything that a submission would do, and submit nothing",
        description="Prints the resolved configuration, the sbatch text, predicted memory, tokens/s, duration, "
        "GPU-hours and checkpoint size, and what preflight finds. Without --cluster an example cluster of nodes with "
        "eight H100 serves.",
        examples=["mq launch dry-run qwen2_5_72b --nodes 128", "mq launch dry-run qwen2_5_7b --nodes 4 --json"],
    )
    _run_options(parser)
    parser.add_argument("--json", action="store_true")


def _array_parser(actions: "argparse._SubParsersAction[Parser]") -> None:
    parser = actions.add_parser(
        "array",
        help="submit many runs as one job array",
        description="FILE is YAML: `recipe`, `overrides` of all runs, and `runs`: names, each with overrides of its "
        "own. Every run gets a directory, attempts and requeues of its own in the run root.",
        examples=["mq launch array sweep.yaml --cluster ours --nodes 1 --at-once 4"],
    )
    parser.add_argument("file", type=Path)
    _job_options(parser)
    parser.add_argument("--at-once", type=int, default=4, help="runs that may run together (%(default)s)")
    parser.add_argument("--run-root", type=Path, help="default: the cluster's")
    parser.add_argument("--json", action="store_true")


def _status_parser(actions: "argparse._SubParsersAction[Parser]") -> None:
    parser = actions.add_parser(
        "status",
        help="state of runs",
        description="One table of runs: state, iteration, loss, tokens/s, time left, attempts, jobs, and for what "
        "needs a hand the command. Works without accounting (slurmdbd).",
        examples=[
            "mq launch status",
            "mq launch status runs/7b-first runs/7b-second --json",
            "mq launch status --watch",
            "mq launch status --check    only what needs a hand, for monitoring: 1 if anything does, else 0",
        ],
    )
    parser.add_argument("runs", nargs="*", type=Path, help=f"run directories, or directories of them ({DEFAULT_RUNS})")
    parser.add_argument("--watch", nargs="?", type=float, const=5.0, metavar="SECONDS", help="repeat the table")
    parser.add_argument(
        "--check",
        action="store_true",
        help="only runs that need a hand (stopped, lost, held, suspended, unknown, waiting for storage); ends with 1 "
        "if there are any",
    )
    parser.add_argument("--json", action="store_true")


def _logs_parser(actions: "argparse._SubParsersAction[Parser]") -> None:
    parser = actions.add_parser(
        "logs",
        help="logs of the ranks",
        description="The log of one rank, or of all of them merged by time, across attempts.",
        examples=[
            "mq launch logs runs/7b-first --rank 0 --follow",
            "mq launch logs runs/7b-first --attempt 3",
            "mq launch logs runs/7b-first --controller",
        ],
    )
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--rank", type=int, action="append", help="only this rank; may be repeated")
    parser.add_argument("--attempt", type=int, help="only this one")
    parser.add_argument("--follow", "-f", action="store_true", help="keep printing until the run ends")
    parser.add_argument("--controller", action="store_true", help="logs of the jobs' controllers instead of the ranks")


def _steering_parsers(actions: "argparse._SubParsersAction[Parser]") -> None:
    for name, text in (
        ("cancel", "Ends the jobs of runs, after they have saved."),
        (
            "requeue",
            "Resumes runs: releases held jobs, requeues running ones, and submits again what has stopped; its "
            "restarts are counted from zero again then.",
        ),
    ):
        parser = actions.add_parser(
            name,
            help=text.partition(":")[0].rstrip("."),
            description=text,
            examples=[f"mq launch {name} runs/7b-first"],
        )
        parser.add_argument("runs", nargs="+", type=Path, help="run directories")
        if name == "requeue":
            parser.add_argument("--new-code", action="store_true", help=f"{_NEW_CODE}; for runs without a job")


def _nodes_parser(actions: "argparse._SubParsersAction[Parser]") -> None:
    parser = actions.add_parser(
        "nodes",
        help="nodes that runs avoid, and how to set them free",
        description="Nodes in quarantine: those that failed runs of this run root, or that a person has put there. New "
        "submissions and requeued jobs avoid them as long as enough others are left. A quarantine ends by itself "
        "(quarantine_hours of the cluster file). --drain asks Slurm to give a node to nobody, which needs the rights "
        "of an operator. Names may be written as Slurm does: n[3-5].",
        examples=[
            "mq launch nodes",
            "mq launch nodes --cluster ours --json",
            "mq launch nodes --lift n3,n4",
            'mq launch nodes --add n3 --hours 48 --why "link errors on mlx5_2"',
            "mq launch nodes --drain n3",
        ],
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--cluster", help="name of a file in launch/clusters, or a path: its run_root")
    where.add_argument("--run-root", type=Path, help=f"directory of runs ({DEFAULT_RUNS})")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--lift", metavar="NODES", help="set these nodes free; failures before do not count any more")
    what.add_argument("--add", metavar="NODES", help="put these nodes into quarantine")
    what.add_argument("--drain", metavar="NODES", help="ask Slurm to drain these nodes (scontrol)")
    parser.add_argument("--hours", type=float, help="of --add; default: the cluster's quarantine_hours, or 24")
    parser.add_argument("--why", help="of --add and --drain: one line; required for --add")
    parser.add_argument("--json", action="store_true")


def _site_parsers(actions: "argparse._SubParsersAction[Parser]") -> None:
    draft = actions.add_parser(
        "cluster-init",
        help="draft a cluster file from what Slurm reports",
        description="Asks sinfo and scontrol about the cluster and prints a draft of a cluster file for review.",
        examples=["mq launch cluster-init > launch/clusters/ours.yaml", "mq launch cluster-init --partition gpu"],
    )
    draft.add_argument("--partition", help="default: the cluster's default one")
    freeze = actions.add_parser(
        "freeze",
        help="make a run directory without submitting, for slurm/train.sbatch",
        description="Does the preflight and the snapshot of submit, without a job.",
        examples=["mq launch freeze qwen2_5_7b data.path=data/corpus --run-dir runs/7b --cluster ours --nodes 16"],
    )
    _run_options(freeze)
    reference = actions.add_parser(
        "reference",
        help="tables for the documentation",
        description="Prints the fields of a cluster file, or the table of what follows the end of an attempt.",
        examples=["mq launch reference cluster", "mq launch reference policy"],
    )
    reference.add_argument("what", choices=["cluster", "policy"])
