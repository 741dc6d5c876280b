"""``mq launch nodes``: the nodes in quarantine, and a person's hand on them."""

import argparse
import getpass
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from launch import cluster as clusters
from launch.arguments import DEFAULT_RUNS
from launch.text import control_character
from megatron_qwen import slurm
from megatron_qwen.errors import ConfigError, Problem, UserError
from megatron_qwen.metrics.console import duration
from megatron_qwen.resilience.quarantine import NAME, Quarantine, QuarantinedNode, is_node_name, moment_of, utc_now

_HOURS = 24.0
# A hundred years; a date beyond the year 9999 cannot be written.
_MOST_HOURS = 876_000.0
_REFUSED = ("Invalid user id", "permission denied", "not permitted")


class DrainError(UserError):
    """Slurm did not drain a node (exit 1)."""

    kind = "Slurm"


def do(options: argparse.Namespace) -> int:
    """Lists, lifts, adds or drains.

    Raises:
        ConfigError: a wrong name, time or text.
        DrainError: Slurm refused.
    """
    described = clusters.load(options.cluster) if options.cluster is not None else None
    root = options.run_root or (Path(described.run_root) if described is not None else DEFAULT_RUNS)
    store = Quarantine(root.absolute() / NAME)
    usual = described.quarantine_hours if described is not None and described.quarantine_hours else _HOURS
    _check(options)
    try:
        if options.lift is not None:
            return _lift(store, _names("--lift", options.lift))
        if options.add is not None:
            hours = usual if options.hours is None else options.hours
            return _add(store, _names("--add", options.add), hours=hours, why=options.why)
        if options.drain is not None:
            return _drain(store, _names("--drain", options.drain), why=options.why)
        return _show(store, as_json=options.json)
    except OSError as error:
        fix = f"cannot be read or written ({error.strerror}); see who owns it."
        raise ConfigError(Problem("quarantine", error.filename or store.path, fix)) from None


def _check(options: argparse.Namespace) -> None:
    problems = []
    if options.hours is not None and not 0 < options.hours <= _MOST_HOURS:  # not a number is neither
        problems.append(Problem("--hours", options.hours, f"must be above 0 and at most {_MOST_HOURS:.0f}."))
    if options.hours is not None and options.add is None:
        problems.append(Problem("--hours", options.hours, "requires --add."))
    if options.add is not None and not (options.why or "").strip():
        problems.append(Problem("--why", options.why, "is required with --add: others will want to know."))
    if options.why is not None and options.add is None and options.drain is None:
        problems.append(Problem("--why", options.why, "requires --add or --drain."))
    if options.why is not None and (character := control_character(options.why)) is not None:
        problems.append(Problem("--why", None, f"holds the control character {character}; remove it."))
    if problems:
        raise ConfigError(problems)


def _names(option: str, text: str) -> list[str]:
    try:
        names = list(dict.fromkeys(slurm.hostnames(text)))
    except ValueError:
        names = []
    wrong = [name for name in names if not is_node_name(name)]
    if not names or wrong or text.count("[") != text.count("]"):
        shown = ", ".join(map(repr, wrong)) or repr(text)
        raise ConfigError(Problem(option, shown, "is no name of a node; write n3, n3,n4 or n[3-5]."))
    return names


def _lift(store: Quarantine, names: Sequence[str]) -> int:
    known = {entry.node for entry in store.in_force()}
    if missing := [name for name in names if name not in known]:
        fix = f"is not in quarantine; these are: {', '.join(sorted(known)) or 'none'}."
        raise ConfigError([Problem("--lift", name, fix) for name in missing])
    for name in names:
        store.lift(name)
        print(f"{name} is free again; failures before now do not count. Jobs that wait already still avoid it")
    return 0


def _add(store: Quarantine, names: Sequence[str], *, hours: float, why: str) -> int:
    _warn_of_unknown(names)
    for name in names:
        entry = store.put(name, hours=hours, by=_who(), why=why)
        print(f"{name} is in quarantine until {entry.until}")
    return 0


def _who() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "a person"


def _warn_of_unknown(names: Sequence[str]) -> None:
    """A word about a name that Slurm does not show: a slip, or a cloud node that is powered down."""
    if not slurm.is_there():
        return
    try:
        shown = slurm.show_nodes()
    except UserError:
        return
    if unknown := [name for name in names if name not in shown]:
        print(f"warning: Slurm shows no node {', '.join(unknown)}", file=sys.stderr)


def _drain(store: Quarantine, names: Sequence[str], *, why: str | None) -> int:
    known = {entry.node: entry.why for entry in store.in_force()}
    problems = []
    for name in names:
        reason = "mq: " + (why or known.get(name) or "asked for by mq launch nodes --drain")
        command = ("scontrol", "update", f"NodeName={name}", "State=DRAIN", f"Reason={reason}")
        try:
            slurm.ask(*command)
        except UserError as error:
            said = "; ".join(str(problem.fix) for problem in error.problems)
            fix = f"was not drained ({said})."
            if any(sign in said for sign in _REFUSED):
                fix = f"was not drained: that needs the rights of an operator. Ask one to run: {shlex.join(command)}"
            problems.append(Problem("--drain", name, fix))
        else:
            print(f"{name} is drained: Slurm starts nothing there until `scontrol update NodeName={name} State=RESUME`")
    if problems:
        raise DrainError(problems)
    return 0


def _show(store: Quarantine, *, as_json: bool) -> int:
    entries, wrong = store.in_force(), store.read()[1]
    for line in wrong:
        print(f"warning: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps([_row(entry) for entry in entries], indent=2))
        return 0
    if not entries:
        print(f"no node is in quarantine ({store.path})")
        return 0
    print(table(entries))
    return 0


def _row(entry: QuarantinedNode) -> dict[str, object]:
    content = asdict(entry)
    del content["lifted"]
    return {**content, "runs": list(entry.runs)}


_COLUMNS = ("node", "since", "until", "left", "by", "failures", "runs", "why")


def table(entries: Sequence[QuarantinedNode]) -> str:
    """The table for people, with the newest failure of each node below it."""
    cells = [_cells(entry) for entry in entries]
    widths = [max(len(line[index]) for line in [_COLUMNS, *cells]) for index in range(len(_COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [_COLUMNS, *cells]
    ]
    for entry in entries:
        lines += ["", *(f"{entry.node}: {_failure(entry, index)}" for index in range(len(entry.evidence)))]
    return "\n".join(lines).rstrip()


def _failure(entry: QuarantinedNode, index: int) -> str:
    one = entry.evidence[index]
    return f"{one.time} attempt {one.attempt} of {one.run}: {one.reason}, {one.detail}"


def _cells(entry: QuarantinedNode) -> tuple[str, ...]:
    left = (moment_of(entry.until) - utc_now()).total_seconds()
    return (
        entry.node,
        entry.since,
        entry.until,
        duration(max(0.0, left)),
        entry.by,
        str(len(entry.evidence)),
        ",".join(Path(run).name for run in entry.runs),
        entry.why if len(entry.why) <= 100 else entry.why[:97] + "...",
    )
