"""``mq launch submit``: preflight, freeze, hand over; and the same for many runs as one array."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch import by_hand, freeze, open_files, orphans, refusals, run_jobs, submission
from launch.cluster_limits import array_limit
from launch.finding import Finding
from launch.preflight import Preflight, check
from launch.quarantined import ToAvoid, to_avoid
from launch.request import SubmitRequest, absolute_paths, with_name
from megatron_qwen import slurm
from megatron_qwen.attempts import AttemptLog
from megatron_qwen.config.source import Override, resolve
from megatron_qwen.config.strict_yaml import read_mapping
from megatron_qwen.config.typed_yaml import YamlReader
from megatron_qwen.errors import EXIT_CONFIG, ConfigError, Problem, UserError
from megatron_qwen.files import LockHeldError, atomic_write, exclusive_lock
from megatron_qwen.recipes.registry import RECIPES
from megatron_qwen.rundir import RunDirectory, RunState


@dataclass(frozen=True)
class Submitted:
    """A run that was submitted.

    Args:
        name: of the run.
        run_dir: its directory.
        jobs: ids.
        notes: what a person should know.
    """

    name: str
    run_dir: Path
    jobs: tuple[str, ...]
    notes: tuple[str, ...]


def submit(request: SubmitRequest, *, new_code: bool) -> tuple[Submitted | None, int]:
    """Submits a run, or says why not.

    Returns:
        What was submitted (None where there was nothing to do or something is wrong) and the exit code.
    """
    found = check(request, on_site=True)
    show(found.findings)
    code = found.exit_code or (EXIT_CONFIG if any(item.severity == "unset" for item in found.findings) else 0)
    if code:
        print(f"nothing was submitted: {_counted(found.findings)}", file=sys.stderr)
        return None, code
    directory = RunDirectory(request.run_dir)
    with alone(request.run_dir):
        orphans.settle(directory)
        if (done := _in_the_way(request, directory, found.data_digest)) is not None:
            print(done)
            return None, 0
        notes = _prepare(request, found, new_code=new_code)
        forgive = directory.state() in (RunState.STOPPED, RunState.CANCELLED)
        after = run_jobs.ending(directory, run_jobs.known([directory]))
        jobs = hand_over(request, directory, forgive=forgive, after=after, say=notes.append)
    return Submitted(request.name, request.run_dir, tuple(jobs), tuple(notes)), 0


def _in_the_way(request: SubmitRequest, directory: RunDirectory, digest: str | None) -> str | None:
    """A word where there is nothing to submit.

    Raises:
        ConfigError: a job of the run waits or runs already, or another configuration owns the directory.
    """
    if problems := directory.foreign_problems(request.config, data_digest=digest):
        raise ConfigError(problems)
    queue = run_jobs.known([directory])
    if jobs := run_jobs.active(directory, queue):
        status = f"mq launch status {shlex.quote(str(request.run_dir))}"
        fix = f"is already in progress as job {', '.join(jobs)}; see `{status}`, or cancel it."
        raise ConfigError(Problem("run", request.name, fix))
    by_hand.require_nobody(directory)
    if directory.state() is RunState.DONE and directory.run_yaml.is_file():
        there = resolve(str(directory.run_yaml), [], RECIPES)
        if there.training.train_iters >= request.config.training.train_iters:
            return f"{request.run_dir} is already done; raise training.train_iters to continue it."
    return None


def _prepare(request: SubmitRequest, found: Preflight, *, new_code: bool) -> list[str]:
    """The run directory; taken back where that fails half way and nothing was there before."""
    existed = request.run_dir.exists()
    try:
        return freeze.freeze(request, data_digest=found.data_digest, new_code=new_code)
    except BaseException:
        freeze.remove_unused(request.run_dir, existed=existed)
        raise


def hand_over(
    request: SubmitRequest,
    directory: RunDirectory,
    *,
    forgive: bool,
    after: Sequence[str] = (),
    say: Callable[[str], object] | None = None,
) -> list[str]:
    """Submits the run's job or chain and notes it; the run's state is as before where Slurm refuses.

    Where it is not known whether Slurm has the job, the run stays queued and announced, and ``orphans`` looks for it.

    Args:
        request: what is submitted.
        directory: of the run, frozen.
        forgive: whether what has gone wrong so far is forgotten: a person wants the run to continue.
        after: jobs that must have ended before: they may still save.
        say: is told about nodes in quarantine; None prints it to stderr.
    """
    jobs: list[str] = []
    avoid = to_avoid(request)
    about = freeze.submission_of(request)
    orphans.announce(directory, about, name=request.name, folder=directory.submission, index=None)
    with _queued([directory], forgive=forgive):
        try:
            first, avoid = _avoiding(avoid, lambda nodes: [submission.submit(request, after=after, exclude=nodes)])
            jobs += first
            for _ in range(1, request.chain or 1):
                jobs.append(submission.submit(request, after=jobs[-1:], exclude=avoid.nodes))
        except UserError as error:
            if jobs and not refusals.may_have_taken(error):
                slurm.ask("scancel", *jobs)
            raise
    freeze.note_jobs(request, jobs, exclude=avoid.nodes)
    orphans.withdraw(directory)
    for note in avoid.notes:
        if say is None:
            print(note, file=sys.stderr)
        else:
            say(note)
    return jobs


def _avoiding(avoid: ToAvoid, send: Callable[[Sequence[str]], list[str]]) -> tuple[list[str], ToAvoid]:
    """Jobs that keep off the nodes in quarantine; off none where Slurm refuses them for want of nodes.

    Too few others may fit the job in a way that only Slurm knows. Bad nodes are better than none.
    """
    try:
        return send(avoid.nodes), avoid
    except UserError as error:
        if not avoid.nodes or not refusals.refuses_nodes(error):
            raise
        why = "; ".join(map(str, error.problems))
        return send(()), ToAvoid((), (f"nodes in quarantine are not avoided, Slurm refuses the job then ({why})",))


@contextmanager
def _queued(directories: Sequence[RunDirectory], *, forgive: bool) -> Iterator[None]:
    """Announced runs are queued from here on; as before, and not announced, where Slurm refuses them."""
    before = [directory.status.read_text() if directory.status.is_file() else None for directory in directories]
    for directory in directories:
        directory.write_status(RunState.QUEUED)
        if forgive:  # before: nothing would do it for a submission that is killed when Slurm has the job
            AttemptLog(directory.attempts).forgive()
    try:
        yield
    except UserError as error:
        if refusals.may_have_taken(error):
            raise refusals.not_known(error, [directory.path for directory in directories]) from None
        for directory, text in zip(directories, before, strict=True):
            orphans.withdraw(directory)
            if text is None:
                directory.status.unlink()
            else:
                atomic_write(directory.status, text)
        raise


@contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Keeps two submissions of one run apart, from the first look to the note of its jobs.

    Raises:
        ConfigError: another one is under way.
    """
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    path = run_dir.parent / f".{run_dir.name}.submitting"

    def warn(said: str) -> None:
        print(f"warning: {said}: submit a run once only", file=sys.stderr)

    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive_lock(path, timeout_s=0, without_locks=warn))
        except LockHeldError:
            raise ConfigError(
                Problem("run", run_dir, "is being submitted by another command; see `mq launch status`.")
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def submit_array(
    requests: Sequence[SubmitRequest],
    *,
    at_once: int,
    name: str | None = None,
    between: Callable[[], None] = lambda: None,
) -> list[Submitted]:
    """Submits runs together as one array.

    Args:
        requests: runs that differ in name, directory and configuration only.
        at_once: runs that may run together.
        name: of the array; None is the first run's.
        between: is called before each run is looked at and before it is prepared, which can take long.

    Raises:
        ConfigError: with everything that is wrong with any of them; nothing is submitted then.
    """
    base = requests[0]
    if base.cluster.scheduler != "slurm":
        raise ConfigError(Problem("--cluster", base.cluster_name, "an array needs Slurm; submit the runs one by one."))
    problems = array_limit(len(requests))
    checked: list[Preflight] = []
    for request in requests:
        between()
        checked.append(check(request, on_site=not checked))
    directories = [RunDirectory(request.run_dir) for request in requests]
    open_files.allow(len(requests))  # a lock each
    with ExitStack() as stack:
        for request in requests:
            stack.enter_context(alone(request.run_dir))
        for directory in directories:
            orphans.settle(directory)
        queue = run_jobs.known(directories)
        for request, found in zip(requests, checked, strict=True):
            problems += _against(request, found, queue)
        if problems:
            raise ConfigError(problems)
        for request, found in zip(requests, checked, strict=True):
            between()
            _prepare(request, found, new_code=False)
        after = [job for directory in directories for job in run_jobs.ending(directory, queue)]
        jobs, avoid = _hand_over_array(requests, directories, at_once=at_once, name=name or base.name, after=after)
    return [
        Submitted(request.name, request.run_dir, (job,), avoid.notes)
        for request, job in zip(requests, jobs, strict=True)
    ]


def _against(request: SubmitRequest, found: Preflight, queue: dict[str, slurm.QueuedJob]) -> list[Problem]:
    """What prevents that a run of an array is submitted."""
    directory = RunDirectory(request.run_dir)
    wrong = [item.problem for item in found.findings if item.severity != "warning"]
    wrong += directory.foreign_problems(request.config, data_digest=found.data_digest)
    problems = [Problem(f"run {request.name}: {item.where}", item.value, item.fix) for item in wrong]
    if run_jobs.active(directory, queue):
        problems.append(Problem("run", request.name, "is already in progress."))
    try:
        by_hand.require_nobody(directory)
    except ConfigError as error:
        problems += error.problems
    return problems


def _hand_over_array(
    requests: Sequence[SubmitRequest],
    directories: Sequence[RunDirectory],
    *,
    at_once: int,
    name: str,
    after: Sequence[str],
) -> tuple[list[str], ToAvoid]:
    """The same as ``hand_over`` for runs that are frozen."""
    # In the first run's directory, which nobody else can write: pickles are read from there.
    folder = directories[0].submission
    avoid = to_avoid(requests[0])
    for index, (request, directory) in enumerate(zip(requests, directories, strict=True)):
        task = index if len(requests) > 1 else None
        orphans.announce(directory, freeze.submission_of(request), name=name, folder=folder, index=task)
    with _queued(directories, forgive=True):
        jobs, avoid = _avoiding(
            avoid,
            lambda nodes: submission.submit_array(
                requests, folder, at_once=at_once, name=name, after=after, exclude=nodes
            ),
        )
    for request, directory, job in zip(requests, directories, jobs, strict=True):
        freeze.note_jobs(request, [job], exclude=avoid.nodes)
        orphans.withdraw(directory)
    return jobs, avoid


@dataclass(frozen=True, kw_only=True)
class ArrayFile:
    """Runs of an array.

    Args:
        recipe: of all, or a run.yaml.
        overrides: of all.
        runs: overrides by name.
    """

    recipe: str
    overrides: tuple[Override, ...] = ()
    runs: dict[str, tuple[Override, ...] | None]


def read_array(path: Path) -> ArrayFile:
    """Reads ``recipe``, ``overrides`` and ``runs`` of a YAML file.

    Raises:
        ConfigError: it is none.
    """
    reader = YamlReader(str(path))
    found = reader.read(ArrayFile, read_mapping(path))
    if found is not None and not found.runs:
        reader.wrong("runs", None, "must map names to lists of section.field=value.")
    reader.raise_problems()
    assert found is not None
    return found


def requests_of(content: ArrayFile, base: SubmitRequest, overrides: list[str]) -> list[SubmitRequest]:
    """A request for each run of an array.

    Args:
        content: of the file.
        base: what the runs share; its run directory's parent takes theirs.
        overrides: of all runs, in addition to those of the file.

    Raises:
        ConfigError: with everything that is wrong with any of them.
    """
    requests, problems = [], []
    for name, own in content.runs.items():
        try:
            words = [*content.overrides, *overrides, *(own or ())]
            requests.append(with_name(base, name, absolute_paths(resolve(content.recipe, words, RECIPES))))
        except ConfigError as error:
            problems += [Problem(f"run {name}: {item.where}", item.value, item.fix) for item in error.problems]
    if problems:
        raise ConfigError(problems)
    return requests


def show(findings: Sequence[Finding]) -> None:
    """Prints findings to stderr."""
    for finding in findings:
        print(finding, file=sys.stderr)


def _counted(findings: Sequence[Finding]) -> str:
    wrong = sum(finding.severity != "warning" for finding in findings)
    return f"{wrong} error{'s' if wrong > 1 else ''} to correct"


def as_json(submitted: Sequence[Submitted]) -> str:
    """For programs."""
    rows = [
        {"name": item.name, "run_dir": str(item.run_dir), "jobs": list(item.jobs), "notes": list(item.notes)}
        for item in submitted
    ]
    return json.dumps(rows, indent=2)
