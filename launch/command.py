"""``mq launch``: runs on a cluster."""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence

from launch import by_hand, cluster, cluster_init, control, dry_run, logs, nodes, orphans, run_jobs, status, submit
from launch.arguments import DEFAULT_RUNS, TAKES_OVERRIDES, parser
from launch.freeze import freeze, note_jobs
from launch.preflight import check
from launch.quarantined import ToAvoid, to_avoid
from launch.request import SubmitRequest, make
from megatron_qwen import slurm
from megatron_qwen.attempts import AttemptLog
from megatron_qwen.cli import run_program
from megatron_qwen.errors import EXIT_CONFIG, EXIT_FAILURE, ConfigError, Problem
from megatron_qwen.resilience import rules
from megatron_qwen.rundir import RunDirectory, RunState


def main(arguments: Sequence[str]) -> int:
    """Does what was asked for."""
    options, overrides = parser().parse_known_args(arguments)
    if overrides and options.action not in TAKES_OVERRIDES:
        raise ConfigError(f"unrecognized arguments: {' '.join(overrides)}. See mq launch {options.action} --help.")
    actions: dict[str, Callable[[argparse.Namespace, list[str]], int]] = {
        "submit": _submit,
        "dry-run": _dry_run,
        "array": _array,
        "freeze": _freeze,
        "status": _status,
        "logs": _logs,
        "cancel": _steer,
        "requeue": _steer,
        "cluster-init": _cluster_init,
        "nodes": _nodes,
        "reference": _reference,
    }
    return actions[options.action](options, overrides)


def _request(options: argparse.Namespace, overrides: list[str], *, dry: bool = False) -> SubmitRequest:
    return make(
        options.source,
        overrides,
        nodes=options.nodes,
        cluster=options.cluster,
        name=options.name,
        run_dir=options.run_dir,
        time_limit=options.time_limit,
        ranks_per_node=options.ranks_per_node,
        spares=options.spares,
        chain=options.chain,
        dry=dry,
    )


def _submit(options: argparse.Namespace, overrides: list[str]) -> int:
    submitted, code = submit.submit(_request(options, overrides), new_code=options.new_code)
    if submitted is None:
        return code
    if options.json:
        print(submit.as_json([submitted]))
        return 0
    print(f"submitted {submitted.name} as job {', '.join(submitted.jobs)}", *submitted.notes, sep="\n  ")
    where = shlex.quote(str(submitted.run_dir))
    print(f"  status: mq launch status {where}\n  logs:   mq launch logs {where} --follow")
    return 0


def _dry_run(options: argparse.Namespace, overrides: list[str]) -> int:
    request = _request(options, overrides, dry=True)
    # The example cluster is nobody's, and a laptop knows nothing of a cluster's disk and limits.
    named = options.cluster is not None
    on_site = named and (slurm.is_there() or request.cluster.scheduler == "local")
    found = check(request, on_site=on_site)
    avoid = to_avoid(request) if on_site else ToAvoid()
    if options.json:
        print(dry_run.as_json(request, found, avoid=avoid))
    else:
        dry_run.show(request, found, avoid=avoid)
    return found.exit_code


def _array(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.at_once < 1:
        raise ConfigError(Problem("--at-once", options.at_once, "must be at least 1."))
    content = submit.read_array(options.file)
    run_dir = None if options.run_root is None else options.run_root / options.file.stem
    base = make(
        content.recipe,
        [*content.overrides, *overrides],
        nodes=options.nodes,
        cluster=options.cluster,
        name=options.file.stem,
        run_dir=run_dir,
        time_limit=options.time_limit,
        ranks_per_node=options.ranks_per_node,
        spares=options.spares,
    )
    submitted = submit.submit_array(submit.requests_of(content, base, overrides), at_once=options.at_once)
    if options.json:
        print(submit.as_json(submitted))
    else:
        for item in submitted:
            print(f"submitted {item.name} as job {', '.join(item.jobs)}")
        for note in submitted[0].notes:  # the same for all
            print(f"  {note}")
        print(f"  status: mq launch status {shlex.quote(str(base.run_dir.parent))}")
    return 0


def _freeze(options: argparse.Namespace, overrides: list[str]) -> int:
    """Preflight without the limits of the cluster: the job that asks runs already."""
    request = _request(options, overrides)
    found = check(request, on_site=False)
    submit.show(found.findings)
    if found.errors or any(item.severity == "unset" for item in found.findings):
        return found.exit_code or EXIT_CONFIG
    directory = RunDirectory(request.run_dir)
    queue = {}
    if request.cluster.scheduler == "slurm" and slurm.is_there():
        orphans.settle(directory)
        queue = run_jobs.known([directory])
    own = os.environ.get("SLURM_JOB_ID")
    if jobs := [job for job in run_jobs.active(directory, queue) if job != own]:
        raise ConfigError(Problem("run", request.name, f"is already in progress as job {', '.join(jobs)}."))
    if jobs := [job for job in run_jobs.ending(directory, queue) if job != own]:
        fix = f"has job {', '.join(jobs)}, which still saves; try again when it has ended."
        raise ConfigError(Problem("run", request.name, fix))
    by_hand.require_nobody(directory)
    for line in freeze(request, data_digest=found.data_digest, new_code=False):
        print(line)
    if directory.state() in (RunState.STOPPED, RunState.CANCELLED):
        AttemptLog(directory.attempts).forgive()  # whoever starts it once more wants it to continue
    directory.write_status(RunState.QUEUED)
    if own is not None:
        note_jobs(request, [own])  # slurm/train.sbatch
    return 0


def _status(options: argparse.Namespace, _: list[str]) -> int:
    places = options.runs or [DEFAULT_RUNS]
    if options.watch is not None:
        if not options.watch > 0:
            raise ConfigError(Problem("--watch", options.watch, "must be a number of seconds above 0."))
        status.watch(places, every_s=options.watch)
        return 0
    look = status.collect(status.find_runs(places))
    wanted = look.needs_a_hand if options.check else look.rows
    if options.json or wanted:
        print(status.as_json(wanted) if options.json else status.table(wanted))
    if look.unasked:
        print(f"Slurm was not asked, so this is what the runs noted last: {look.unasked}", file=sys.stderr)
    incomplete = look.unasked is not None and (options.check or slurm.is_there())
    return EXIT_FAILURE if incomplete or (options.check and wanted) else 0


def _logs(options: argparse.Namespace, _: list[str]) -> int:
    run = status.find_runs([options.run])[0]
    if options.controller:
        if not run.controller_log.is_file():
            raise ConfigError(Problem("--controller", run.controller_log, "does not exist: no job has started yet."))
        with run.controller_log.open(errors="replace") as file:
            shutil.copyfileobj(file, sys.stdout)
        return 0
    if options.follow:
        logs.follow(run, ranks=options.rank, out=sys.stdout)
    else:
        logs.show(run, ranks=options.rank, attempt=options.attempt, out=sys.stdout)
    return 0


def _steer(options: argparse.Namespace, _: list[str]) -> int:
    runs: list[RunDirectory] = status.find_runs(options.runs)
    cancels = options.action == "cancel"
    for line in control.cancel(runs) if cancels else control.requeue(runs, new_code=options.new_code):
        print(line, flush=True)  # each may take a minute
    return 0


def _nodes(options: argparse.Namespace, _: list[str]) -> int:
    return nodes.do(options)


def _cluster_init(options: argparse.Namespace, _: list[str]) -> int:
    print(cluster_init.draft(options.partition), end="")
    return 0


def _reference(options: argparse.Namespace, _: list[str]) -> int:
    print(cluster.reference() if options.what == "cluster" else rules.table())
    return 0


if __name__ == "__main__":
    run_program(main)
