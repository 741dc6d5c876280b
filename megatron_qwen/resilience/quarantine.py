"""Nodes that runs avoid for a time: one small file per node in a directory that the runs of a cluster share.

One file per node needs no lock: a file is replaced as a whole, and what two writers at once lose is a line of evidence.
A file that cannot be read is reported and ends nothing.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_qwen.files import atomic_write_json

NAME = ".quarantine"
CONTROLLER = "controller"
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
_MOST_EVIDENCE = 8
_LONGEST_TEXT = 300


@dataclass(frozen=True)
class QuarantineEvidence:
    """One failure that speaks against a node.

    Args:
        run: directory of the run.
        attempt: its number.
        reason: of its end.
        detail: one line.
        time: ISO time.
    """

    run: str
    attempt: int
    reason: str
    detail: str
    time: str


@dataclass(frozen=True)
class QuarantinedNode:
    """A node that runs avoid.

    Args:
        node: its name.
        since: ISO time.
        until: ISO time.
        by: who put it there: ``controller`` or a person.
        why: one line.
        evidence: newest last.
        lifted: ISO time at which a person or a later finding set it free; None while it is avoided.
    """

    node: str
    since: str
    until: str
    by: str
    why: str
    evidence: tuple[QuarantineEvidence, ...] = ()
    lifted: str | None = None

    @property
    def runs(self) -> tuple[str, ...]:
        """The runs whose failures speak against it."""
        return tuple(dict.fromkeys(one.run for one in self.evidence))

    def in_force(self, moment: datetime.datetime) -> bool:
        """Whether it is to be avoided at a moment."""
        return self.lifted is None and moment_of(self.until) > moment


class Quarantine:
    """The directory.

    Args:
        path: of it; made at the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[list[QuarantinedNode], list[str]]:
        """All files, lifted and expired ones too, by node; and a line for each that cannot be read.

        Raises:
            OSError: the directory is there and cannot be listed.
        """
        found, wrong = [], []
        for path in sorted(self.path.glob("*.json")) if self.path.is_dir() else []:
            try:
                found.append(_entry(json.loads(path.read_text(encoding="utf-8"))))
            except FileNotFoundError:
                continue  # expired, and removed by another
            except (OSError, ValueError, KeyError, TypeError) as error:
                wrong.append(f"{path} cannot be read and is ignored ({error})")
        return found, wrong

    def in_force(self) -> list[QuarantinedNode]:
        """Nodes to avoid now, the best proven first: by the number of failures, then the newest."""
        now = utc_now()
        found = [entry for entry in self.read()[0] if entry.in_force(now)]
        return sorted(found, key=lambda entry: (len(entry.evidence), entry.since), reverse=True)

    def lifted(self) -> dict[str, str]:
        """Nodes that have been set free, and when: earlier failures speak against them no more."""
        return {entry.node: entry.lifted for entry in self.read()[0] if entry.lifted is not None}

    def put(
        self, node: str, *, hours: float, by: str, why: str, evidence: Sequence[QuarantineEvidence] = ()
    ) -> QuarantinedNode:
        """Has runs avoid a node from now on, for so many hours; what is known of it already is kept.

        A person's entry that is in force stays a person's: a controller adds its evidence.

        Raises:
            ValueError: that is no name of a node.
            OSError: it cannot be written.
        """
        now = utc_now()
        before = self._known(node)
        known = [*(before.evidence if before is not None and before.in_force(now) else ())]
        known += [_short(one) for one in evidence if (one.run, one.attempt) not in {(k.run, k.attempt) for k in known}]
        until = now + datetime.timedelta(hours=hours)
        since = now
        if before is not None and before.in_force(now):
            until, since = max(until, moment_of(before.until)), moment_of(before.since)
            if by == CONTROLLER != before.by:
                by, why = before.by, before.why
        entry = QuarantinedNode(
            node, _text(since), _text(until), by, why[:_LONGEST_TEXT], tuple(known[-_MOST_EVIDENCE:])
        )
        self._write(entry)
        self._remove_expired(keep_h=hours)
        return entry

    def lift(self, node: str) -> bool:
        """Sets a node free; returns whether it was avoided. The file stays for a time: failures before count no more.

        Raises:
            OSError: it cannot be written.
        """
        now, before = utc_now(), self._known(node)
        if before is None or not before.in_force(now):
            return False
        self._write(replace(before, lifted=_text(now)))
        return True

    def _known(self, node: str) -> QuarantinedNode | None:
        try:
            return _entry(json.loads(self._file(node).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self, entry: QuarantinedNode) -> None:
        path = self._file(entry.node)
        self.path.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, asdict(entry))

    def _file(self, node: str) -> Path:
        if not _NODE.fullmatch(node):
            raise ValueError(f"{node!r} is no name of a node")
        return self.path / f"{node}.json"

    def _remove_expired(self, *, keep_h: float) -> None:
        """Removes files that neither keep a node out nor remember that it was set free lately."""
        old = utc_now() - datetime.timedelta(hours=keep_h)
        for entry in self.read()[0]:
            if moment_of(entry.until) < old and moment_of(entry.lifted or entry.until) < old:
                with suppress(OSError):
                    self._file(entry.node).unlink(missing_ok=True)


def is_node_name(text: str) -> bool:
    """Whether a text can be the name of a node, and of a file."""
    return _NODE.fullmatch(text) is not None


def utc_now() -> datetime.datetime:
    """The current time."""
    return datetime.datetime.now(datetime.UTC)


def moment_of(text: str) -> datetime.datetime:
    """An ISO time of the files; one without a zone is UTC.

    Raises:
        ValueError: it is none.
    """
    moment = datetime.datetime.fromisoformat(text)
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=datetime.UTC)


def _text(moment: datetime.datetime) -> str:
    return moment.isoformat(timespec="seconds")


def _short(one: QuarantineEvidence) -> QuarantineEvidence:
    return replace(one, detail=one.detail[:_LONGEST_TEXT])


def _entry(content: Mapping[str, Any]) -> QuarantinedNode:
    node, lifted = str(content["node"]), content.get("lifted")
    if not _NODE.fullmatch(node):
        raise ValueError("no name of a node")
    evidence = tuple(
        QuarantineEvidence(
            str(one["run"]), int(one["attempt"]), str(one["reason"]), str(one["detail"]), str(one["time"])
        )
        for one in content.get("evidence") or ()
    )
    entry = QuarantinedNode(
        node,
        str(content["since"]),
        str(content["until"]),
        str(content["by"]),
        str(content["why"]),
        evidence,
        None if lifted is None else str(lifted),
    )
    for moment in (entry.since, entry.until, *([entry.lifted] if entry.lifted else [])):
        moment_of(moment)
    return entry
