"""Which node a rank is on, and which ranks of other nodes keep a copy of its piece."""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_qwen.errors import ConfigError, Problem


def node_name(environ: Mapping[str, str] = os.environ) -> str:
    """Slurm's name of this node; without Slurm its host name."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True)
class Nodes:
    """The nodes of a run.

    Args:
        of_rank: name of the node of every rank.
    """

    of_rank: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Each node once, in the order of its first rank."""
        return tuple(dict.fromkeys(self.of_rank))

    def ranks_of(self, node: str) -> list[int]:
        """Ranks on a node."""
        return [rank for rank, name in enumerate(self.of_rank) if name == node]

    def partners(self, rank: int) -> tuple[int, ...]:
        """Ranks that keep copies for one another, this one included: the same place on two or three nodes.

        Each sends its piece to the next of them. Pairs of nodes, and not a ring over all: a group of a few ranks costs
        few connections, however many ranks there are. Two lost nodes lose a piece only if they are partners.

        Example: ranks 0 to 3 on a, 4 to 7 on b, 8 to 11 on c: rank 5 has the partners (1, 5, 9).
        """
        nodes = self.names
        number, place = nodes.index(self.of_rank[rank]), self.ranks_of(self.of_rank[rank]).index(rank)
        first = number - number % 2
        if first + 1 >= len(nodes) and first >= 2:  # an odd node joins the pair before it
            first -= 2
        together = nodes[first : len(nodes) if len(nodes) - first == 3 else first + 2]
        here = [self.ranks_of(node) for node in together]
        return tuple(ranks[place] for ranks in here if place < len(ranks))


def expand(text: str, *, run_dir: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """checkpoint.local_dir on this node: ``%n`` is the name of the node, ``$NAME`` a variable.

    Raises:
        ConfigError: it names a variable that is not set, is not absolute, or lies in the run directory, which the
            nodes share.
    """
    value = text.replace("%n", node_name(environ))
    for name in sorted(environ, key=len, reverse=True):
        value = value.replace(f"${{{name}}}", environ[name]).replace(f"${name}", environ[name])
    path = Path(value)
    problem = None
    if "$" in value:
        problem = f"names a variable that is not set on {node_name(environ)}; set it, or write a path."
    elif not path.is_absolute():
        problem = "must be an absolute path on every node, such as /dev/shm or a local disk."
    elif path.is_relative_to(run_dir.resolve()) or path.is_relative_to(run_dir):
        problem = "lies in the run directory, which all nodes share; use memory (/dev/shm) or a disk of the node."
    if problem is not None:
        raise ConfigError(Problem("checkpoint.local_dir", text, problem))
    return path


def place_of_run(base: Path, run_id: str) -> Path:
    """Directory of a run's pieces on a node."""
    return base / f"megatron_qwen_{os.getuid()}" / run_id


def make_private(directory: Path) -> None:
    """Makes the directory of a run's pieces, and refuses one that others could have prepared: /dev/shm is everybody's.

    Raises:
        OSError: it cannot be made, or belongs to another user.
    """
    for path in (directory.parent, directory):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_private(directory):
        raise PermissionError(1, "belongs to another user, or others may write to it", str(directory))


def is_private(directory: Path) -> bool:
    """Whether it and its parent are directories of this user that nobody else writes to."""
    return all(_is_own(path) for path in (directory.parent, directory))


def _is_own(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return path.is_dir() and not path.is_symlink() and found.st_uid == os.getuid() and not found.st_mode & 0o022


def others_in(directory: Path) -> Sequence[Path]:
    """Directories of other runs of this user on the node."""
    try:
        return sorted(path for path in directory.parent.iterdir() if path != directory and path.is_dir())
    except OSError:
        return []
