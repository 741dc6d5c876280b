"""The stacks of all ranks at a hang: requested by signal, collected from the logs, and compared."""

import re
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_qwen.job.ranks import Ranks

# Every rank prints the stacks of its threads on this signal (``resilience.stack_dump``); NCCL does not use it.
DUMP_SIGNAL = signal.SIGQUIT
# For the stacks to appear in the log files of a shared file system. A stopped process never prints one. Chosen by hand.
_WAIT_S = 10.0
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x[0-9a-f]+ .*\(most recent call first\):$", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
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

    Args:
        ranks: the processes.
        logs: where each writes rank_N.log.
    """
    nodes = ranks.nodes_of_ranks()
    before = {rank: _size(_log(logs, rank)) for rank in nodes}
    ranks.send(DUMP_SIGNAL)
    deadline = time.monotonic() + _WAIT_S
    dumps: dict[int, str] = {}
    while time.monotonic() < deadline and len(dumps) < len(nodes):
        time.sleep(0.5)
        dumps = {rank: text for rank in nodes if _complete(text := _since(_log(logs, rank), before[rank]))}
    found = compare(dumps, nodes)
    whole = [*found.summary]
    for rank in sorted(dumps):
        whole += ["", f"==== rank {rank} on {nodes[rank]}", dumps[rank].rstrip()]
    (logs / "stacks.txt").write_text("\n".join(whole) + "\n")
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
    main = next((block for block in blocks if "megatron_qwen/train.py" in block), blocks[-1] if blocks else "")
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
    """Whether the dump is complete: faulthandler prints the main thread last, and train.py is its outermost frame."""
    return "megatron_qwen/train.py" in text
