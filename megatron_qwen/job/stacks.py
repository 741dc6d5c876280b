"""The stacks of all ranks at a hang: asked for by a file and by signal, collected from the logs, and compared."""

import contextlib
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_qwen.job import collectives
from megatron_qwen.job.ranks import Ranks
from megatron_qwen.resilience import dump_watch

# For the stacks to appear in the log files of a shared file system, after the ranks have looked for the request. A
# stopped process never prints one. Chosen by hand.
_WAIT_S = 10.0
# Ranks that have not answered the file are asked once more through Slurm, which may be what is broken. Chosen by hand.
_ASK_AGAIN_S = 5.0
_TRACE_WAIT_S = 3.0
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x[0-9a-f]+ .*\(most recent call first\):$", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
_MAIN = re.compile(r'megatron_qwen/train\.py", line \d+ in main$', re.MULTILINE)
_OWN = ("megatron_qwen/", "megatron/", "checkpoints_convert/")


@dataclass(frozen=True)
class Stacks:
    """What was found.

    Args:
        summary: one line for each group of ranks that are at the same place.
        odd: ranks that are elsewhere than most ranks, or printed no stack.
    """

    summary: tuple[str, ...]
    odd: tuple[int, ...]


def gather(ranks: Ranks, logs: Path) -> Stacks:
    """Has every rank print its stacks, writes all of them to stacks.txt, and finds the ranks that differ.

    The ranks are asked by a file that they watch (``resilience.dump_watch``). Those that stay silent are asked by a
    signal as well. That one is sent by a thread: with slurmctld down it takes minutes to fail.

    Args:
        ranks: the processes.
        logs: where each writes rank_N.log.
    """
    nodes = ranks.nodes_of_ranks()
    before = {rank: _size(_log(logs, rank)) for rank in nodes}
    with contextlib.suppress(OSError):  # a full disk; the signal needs none
        dump_watch.ask(logs)
    # A node whose first rank is stuck answers one turn later.
    patience_s = 2 * dump_watch.turn_s(len(set(nodes.values())))
    again, deadline = time.monotonic() + max(_ASK_AGAIN_S, patience_s), time.monotonic() + _WAIT_S + patience_s
    asker = threading.Thread(target=ranks.send, args=(dump_watch.DUMP_SIGNAL,), daemon=True)
    dumps: dict[int, str] = {}
    while time.monotonic() < deadline and len(dumps) < len(nodes):
        time.sleep(0.5)
        for rank in nodes.keys() - dumps.keys():
            if _complete(text := _since(_log(logs, rank), before[rank])):
                dumps[rank] = text
        if len(dumps) < len(nodes) and time.monotonic() > again and not asker.is_alive():
            again = float("inf")
            asker.start()
    called = collectives.summarise(_collectives(logs, list(dumps)))
    found = compare(dumps, nodes)
    # On GPUs ranks often wait at one place for different collectives: then the collectives say who is missing.
    found = Stacks((*found.summary, *called.lines), found.odd or called.behind)
    whole = [*found.summary]
    for rank in sorted(dumps):
        whole += ["", f"==== rank {rank} on {nodes[rank]}", dumps[rank].rstrip()]
    (logs / "stacks.txt").write_text("\n".join(whole) + "\n")
    return found


def _collectives(logs: Path, ranks: list[int]) -> dict[int, list[dict[str, Any]]]:
    """What ranks that answered wrote of their collectives, a moment after they began to print their stacks."""
    deadline = time.monotonic() + _TRACE_WAIT_S
    while len(found := collectives.read(logs, ranks)) < len(ranks) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def compare(dumps: Mapping[int, str], nodes: Mapping[int, str]) -> Stacks:
    """Groups ranks by the place where their main thread is.

    Args:
        dumps: what faulthandler printed, by rank.
        nodes: node of every rank, also of those without a dump.
    """
    places = {rank: _place(text) for rank, text in dumps.items()}
    silent = sorted(set(nodes) - set(places))
    counts = Counter(places.values())
    most = counts.most_common(1)[0][0] if counts else ""
    lines = []
    for place, count in counts.most_common():
        members = sorted(rank for rank, where in places.items() if where == place)
        lines.append(f"{count} of {len(nodes)} ranks ({_named(members, nodes)}) are at {place}")
    if silent:
        lines.append(f"no stack from {_named(silent, nodes)}: the process is stopped, or blocked in the kernel")
    # If some ranks print nothing, the others wait for them in a collective: the silent ranks are the suspects.
    odd = silent or sorted(rank for rank, place in places.items() if place != most)
    return Stacks(tuple(lines), tuple(odd))


def _place(text: str) -> str:
    """The innermost frames of the main thread, down to the project's own code."""
    blocks = _THREAD.split(text)[1:]
    main = next((block for block in reversed(blocks) if _complete(block)), blocks[-1] if blocks else "")
    frames = [f"{Path(path).name}:{line} {name}" for path, line, name in _FRAME.findall(main)]
    own = [index for index, (path, _, _) in enumerate(_FRAME.findall(main)) if any(part in path for part in _OWN)]
    return " < ".join(frames[: (own[0] + 1 if own else 1)][:6]) or "no frame"


def _named(ranks: list[int], nodes: Mapping[int, str]) -> str:
    shown = ", ".join(f"rank {rank} on {nodes[rank]}" for rank in ranks[:8])
    return shown + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _log(logs: Path, rank: int) -> Path:
    return logs / f"rank_{rank}.log"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _since(path: Path, offset: int) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace")


def _complete(text: str) -> bool:
    """Whether the dump is complete: faulthandler prints the main thread last, which is in ``main`` of train.py."""
    return _MAIN.search(text) is not None
