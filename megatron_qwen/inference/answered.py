"""Answers kept on disk, so that what is started again after a kill computes only the others."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.files import LockHeldError, exclusive_lock, sync_stream
from megatron_qwen.json_lines import objects


class AnsweredLog:
    """A file of JSON lines: what was asked of what, then an answer a line, by a key.

    Args:
        path: of the file, made at the first answer; None keeps answers in memory only.
        identity: everything that decides the answers and is not in their keys: model, precision, tokenizer.

    Raises:
        ConfigError: the file has answers of something else, or another process writes it.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self._path, self._identity = path, json.loads(json.dumps(identity))
        self._places: dict[str, int] = {}  # where a line begins: answers of millions of prompts stay on the disk
        self._held: dict[str, Any] = {}
        self._whole = 0  # bytes of complete lines
        self._held_open = ExitStack()
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Until this process ends, or ``remove``: two writers would overwrite each other's lines.
            self._held_open.enter_context(exclusive_lock(self._lock, timeout_s=0, inherited=False))
        except LockHeldError:
            fix = "is being written by another command; wait for it, or choose another output."
            raise ConfigError(Problem(str(path), None, fix)) from None
        if path.is_file():
            self._read(path)

    @property
    def _lock(self) -> Path:
        assert self._path is not None
        return self._path.with_name(self._path.name + ".lock")

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in self._held

    def __getitem__(self, key: str) -> Any:
        if self._path is None:
            return self._held[key]
        with self._path.open("rb") as file:
            file.seek(self._places[key])
            record = json.loads(file.readline())
        assert record["key"] == key, f"{self._path} was changed by another program"
        return record["answer"]

    def __len__(self) -> int:
        return len(self._places) or len(self._held)

    def keep(self, answers: Mapping[str, Any]) -> None:
        """Writes answers; they are on disk afterwards."""
        if self._path is None:
            self._held.update(answers)
            return
        if not answers:
            return
        content = b"" if self._whole else json.dumps({"identity": self._identity}).encode() + b"\n"
        places = {}
        for key, answer in answers.items():
            places[key] = self._whole + len(content)
            content += json.dumps({"key": key, "answer": answer}).encode() + b"\n"
        with self._path.open("r+b" if self._path.exists() else "w+b") as file:
            file.seek(self._whole)
            file.truncate()  # half a line of a killed process
            file.write(content)
            sync_stream(file)
        self._whole += len(content)
        self._places.update(places)

    def remove(self) -> None:
        """Removes the file."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._lock.unlink(missing_ok=True)
            self._held_open.close()

    def _read(self, path: Path) -> None:
        with path.open("rb") as file:
            head = file.readline()
            if not head.endswith(b"\n"):
                return
            before = next(objects([head]), {}).get("identity")
            if before != self._identity:
                raise ConfigError(Problem(str(path), _difference(before, self._identity), _FIX))
            self._whole = len(head)
            while (line := file.readline()).endswith(b"\n"):
                record = next(objects([line]), {})
                if "key" in record and "answer" in record:
                    self._places[record["key"]] = self._whole
                self._whole += len(line)


_FIX = "has answers of something else; remove it, or choose another output."


def _difference(before: Any, now: Mapping[str, Any]) -> str:
    if not isinstance(before, dict):
        return "no answers"
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return ", ".join(f"{name} {before.get(name)} and not {now.get(name)}" for name in names)
