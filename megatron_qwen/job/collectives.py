"""What the flight recorders of all ranks say about a hang: which collective waits, and for whom.

Ranks write them as JSON (``distributed.flight_recorder``). torch's own dumps are pickles and are not read here.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_qwen.resilience.dump_watch import trace_file

_MOST_NAMED = 8


@dataclass(frozen=True)
class CollectiveState:
    """The newest collective of a group on one rank.

    Args:
        sequence: number of the collective in its group, from 1; 0 where the rank has called none.
        name: such as ``nccl:all_reduce``.
        done: whether it has ended on this rank.
    """

    sequence: int
    name: str
    done: bool


@dataclass(frozen=True)
class CollectiveReport:
    """What was found.

    Args:
        lines: for people, one a group that waits.
        behind: ranks that others wait for.
    """

    lines: tuple[str, ...] = ()
    behind: tuple[int, ...] = ()


def read(logs: Path, ranks: Collection[int]) -> dict[int, list[dict[str, Any]]]:
    """The groups of every rank that wrote a readable file."""
    found = {}
    for rank in ranks:
        try:
            groups = json.loads(trace_file(logs, rank).read_text())["groups"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(groups, list):
            found[rank] = [group for group in groups if isinstance(group, dict)]
    return found


def summarise(traces: Mapping[int, list[dict[str, Any]]]) -> CollectiveReport:
    """Compares the newest collective of every group over its ranks.

    - Ranks whose newest number is lower than that of others have not come to the collective: the others wait for them.
      If such a rank waits in another group itself, it is not to blame.
    - Ranks with the same number but another operation have parted from the program of the others. Sizes are not
      compared: those of an all-to-all differ.
    - If all have called it and some wait, what waits is the communication itself.

    A group whose collectives have all ended is not mentioned.
    """
    members: dict[str, set[int]] = defaultdict(set)
    descriptions: dict[str, str] = {}
    states: dict[str, dict[int, CollectiveState]] = defaultdict(dict)
    for rank, groups in traces.items():
        for group in groups:
            name = str(group.get("name"))
            members[name] |= {rank, *(group.get("ranks") or ())}
            descriptions[name] = str(group.get("description") or "")
            if (state := _newest(group)) is not None:
                states[name][rank] = state
    lines, suspects, waiting = [], set[int](), set[int]()
    for name in sorted(states, key=lambda one: (len(members[one]), one)):
        never = (members[name] & traces.keys()) - states[name].keys()
        called = states[name] | dict.fromkeys(never, CollectiveState(0, "", True))
        waits = {rank for rank, state in called.items() if not state.done}
        if not waits:
            continue
        said, late = _of_group(called, waits)
        silent = sorted(members[name] - traces.keys())
        shown = f"group {name}" + (f" ({descriptions[name]})" if descriptions[name] else "")
        heard = f"; nothing is known of {_named(silent)}" if silent else ""
        lines.append(f"{shown} of {len(members[name])} ranks: {said}{heard}")
        suspects |= set(late)
        waiting |= waits
    return CollectiveReport(tuple(lines), tuple(sorted(suspects - waiting)))


def _newest(group: Mapping[str, Any]) -> CollectiveState | None:
    """The newest collective; transfers from one rank to another have numbers of their own and are left out."""
    entries = [entry for entry in group.get("collectives") or () if isinstance(entry, dict) and not entry.get("is_p2p")]
    if not entries:
        return None
    last = max(entries, key=lambda entry: int(entry.get("collective_seq_id") or 0))
    sequence, name = int(last.get("collective_seq_id") or 0), str(last.get("profiling_name") or "?")
    return CollectiveState(sequence, name, bool(last.get("done")))


def _of_group(called: Mapping[int, CollectiveState], waits: set[int]) -> tuple[str, list[int]]:
    """One line about a group that waits, and the ranks that keep it waiting."""
    newest = max(state.sequence for state in called.values())
    late = [rank for rank, state in called.items() if state.sequence < newest]
    ways = defaultdict(list)
    for rank, state in called.items():
        if state.sequence == newest:
            ways[state.name].append(rank)
    most = max(ways, key=lambda way: len(ways[way]))
    if len(ways) > 1:
        others = [rank for way, ranks in ways.items() if way != most for rank in ranks]
        each = "; ".join(f"{way} on {_named(ranks)}" for way, ranks in ways.items())
        return f"ranks call different collectives as number {newest}: {each}", others
    where = f"{_named(waits)} {'waits' if len(waits) == 1 else 'wait'} in {most}, number {newest}"
    if late:
        return f"{where}; {_named(late)} came no further than {max(called[rank].sequence for rank in late)}", late
    return f"{where}, which every rank that answered has called", []


def _named(ranks: Collection[int]) -> str:
    listed = ", ".join(map(str, sorted(ranks)[:_MOST_NAMED]))
    more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {listed}{more}"
