"""A Hugging Face directory, read without trust; all that is wrong with it is named at once."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from checkpoints_convert.safetensors_format import StoredEntry, read_header
from checkpoints_convert.surplus import EMBEDDING, HEAD, may_be_surplus, surplus_faults
from checkpoints_convert.unexpected_file import what_it_is
from megatron_qwen.checkpoint.read import TensorInfo
from megatron_qwen.config.run import Architecture
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.data.tokenizers.tokenizer import TOKENIZER_FILES
from megatron_qwen.errors import ConversionError, Problem
from megatron_qwen.hf.config import architecture_from_hf
from megatron_qwen.hf.mapping import count_hf_tensors, hf_tensors

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION, ADAPTER = "generation_config.json", "adapter_config.json"
QUANTIZATION = "quantization_config"
# Bound on what is parsed at once, so that a crafted file cannot fill the memory: the index of 18,867 tensors (a
# Qwen3-30B) takes less than 2 MB.
_LARGEST_JSON = 64 << 20
_SHOWN = 10
# More than these are not looked for one by one.
_MOST_MISSING = 200_000
FORMATS = (torch.bfloat16, torch.float16, torch.float32)


class HfDirectory:
    """A model of the family in safetensors files.

    Args:
        path: the directory.
        mixed: whether tensors may have several formats.

    Attributes:
        generation: generation_config.json; None if there is none.
        passed_over: what lies in the directory and is not part of the model; for people.
        read_as: tensors that are taken under another name than they have; for people.

    Raises:
        ConversionError: with everything that is wrong with it.
    """

    def __init__(self, path: Path, *, mixed: bool = True) -> None:
        self.path = path
        problems: list[Problem] = []
        if not path.is_dir():
            raise ConversionError(Problem(str(path), None, "is not a directory."))
        if not (path / CONFIG).exists() and (path / "snapshots").is_dir():
            names = sorted(item.name for item in (path / "snapshots").iterdir())
            fix = f"is a model of a download cache; name the directory that holds its files: {', '.join(names[:3])}."
            raise ConversionError(Problem(str(path / "snapshots"), None, fix))
        self.config = self._config(problems)
        has_generation = (path / GENERATION).is_file() and self._outside(path / GENERATION) is None
        self.generation = read_json(path / GENERATION, problems) if has_generation else None
        self._architecture: Architecture | None = None
        try:
            if self.config is not None:
                self._architecture = architecture_from_hf(self._plain_config(), where=str(path / CONFIG))
        except ConversionError as error:
            problems += error.problems
        problems += self._tokenizer_problems()
        self.passed_over: list[str] = []
        self.read_as: list[str] = []
        self._files: dict[str, Path] = {}
        self._entries: dict[str, StoredEntry] = {}
        self._collect(problems)
        if self._architecture is not None and self._entries:
            model = self._architecture.model
            if faults := self._far_off(model):
                problems += faults
            else:
                self._find_quantized(model, problems)
                problems += self._misfits(model, mixed=mixed)
        if problems:
            raise ConversionError(problems)
        self.tensors: dict[str, TensorInfo] = {
            name: TensorInfo(entry.shape, entry.dtype) for name, entry in self._entries.items()
        }

    @property
    def architecture(self) -> Architecture:
        """What config.json says of the model."""
        assert self._architecture is not None
        return self._architecture

    @property
    def shape(self) -> ModelConfig:
        """The shape of the model."""
        return self.architecture.model

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor."""
        entry = self._entries[name]
        width = torch.Size(entry.shape[1:]).numel() * entry.dtype.itemsize
        values = torch.empty((stop - start, *entry.shape[1:]), dtype=entry.dtype)
        with self._files[name].open("rb", buffering=0) as file:
            file.seek(entry.offset + start * width)
            view = memoryview(values.view(-1).view(torch.uint8).numpy())
            while len(view):
                taken = file.readinto(view)
                if not taken:
                    raise ConversionError(Problem(str(self._files[name]), name, "is truncated."))
                view = view[taken:]
        return values

    def digest(self) -> str:
        """xxh3-128 of what tells one state of the directory from another without reading the weights."""
        found = xxhash.xxh3_128()
        found.update(json.dumps(self.config, sort_keys=True).encode())
        for path in sorted(set(self._files.values())):
            status = path.stat()
            found.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        for name, entry in sorted(self._entries.items()):
            found.update(f"{name} {entry.dtype} {entry.shape} {entry.offset}\n".encode())
        return found.hexdigest()

    def files(self) -> dict[str, list[str]]:
        """By file, the tensors it holds."""
        found: dict[str, list[str]] = {}
        for name, path in self._files.items():
            found.setdefault(path.name, []).append(name)
        return found

    def tokenizer_files(self) -> list[str]:
        """Names of the tokenizer's files that are there."""
        return [name for name in TOKENIZER_FILES if (self.path / name).is_file()]

    def _tokenizer_problems(self) -> list[Problem]:
        """What is wrong with the tokenizer's files: an export has them as they are, and so have its users."""
        problems: list[Problem] = []
        for path in (self.path / name for name in TOKENIZER_FILES):
            if not _is_there(path):
                continue
            if (fault := self._outside(path) or what_it_is(path)) is not None:
                problems.append(Problem(str(path), None, fault))
            elif path.suffix == ".json" and path.name != GENERATION:  # that has been read already
                read_json(path, problems)
        return problems

    def _config(self, problems: list[Problem]) -> dict[str, Any] | None:
        if _is_there(self.path / CONFIG) and (fault := self._outside(self.path / CONFIG)):
            problems.append(Problem(str(self.path / CONFIG), None, fault))
            return None
        return read_json(self.path / CONFIG, problems)

    def _collect(self, problems: list[Problem]) -> None:
        if (self.path / ADAPTER).is_file():
            fix = (
                "is next to the weights: where peft is installed, transformers applies the adapter to them, or loads "
                "its base model instead. Merge it into the weights (peft's merge_and_unload), or move it away."
            )
            problems.append(Problem(str(self.path / ADAPTER), None, fix))
        if _is_there(self.path / INDEX):
            if fault := self._outside(self.path / INDEX):
                problems.append(Problem(str(self.path / INDEX), None, fault))
                return
            files = self._indexed(problems)
            if (self.path / SINGLE).exists() and files and SINGLE not in files:
                fix = (
                    f"lies beside {INDEX}, which names other files: two sets of weights. transformers reads {SINGLE}; "
                    "remove the set that is not meant."
                )
                problems.append(Problem(str(self.path / SINGLE), None, fix))
        elif _is_there(self.path / SINGLE):
            files = {SINGLE: None}
        else:
            pickled = sorted(item.name for item in self.path.iterdir() if item.suffix in (".bin", ".pt", ".pth"))
            fix = f"has neither {SINGLE} nor {INDEX}"
            if pickled:
                fix += (
                    f", only pickled weights ({', '.join(pickled[:3])}), which can run code when they are read; save "
                )
                fix += "the model with transformers' save_pretrained, which writes safetensors"
            problems.append(Problem(str(self.path), None, f"{fix}."))
            return
        others = sorted(item.name for item in self.path.glob("*.safetensors") if item.name not in files)
        if others:
            self.passed_over.append(f"weights that transformers does not read: {', '.join(others[:_SHOWN])}")
        for file, expected in sorted(files.items()):
            path = self.path / file
            if fault := self._outside(path):
                problems.append(Problem(str(path), None, fault))
                continue
            entries, faults = read_header(path)
            problems += faults
            self._take(path, entries, expected, problems)
        missing = [
            name
            for names in files.values()
            for name in sorted(names or ())
            if name not in self._entries and not may_be_surplus(name)
        ]
        if missing and not problems:
            problems.append(many(self.path / INDEX, missing, "tensors of the index are in no file"))

    def _indexed(self, problems: list[Problem]) -> dict[str, set[str] | None]:
        """By file, the tensors that the index says it holds."""
        content = read_json(self.path / INDEX, problems)
        weight_map = None if content is None else content.get("weight_map")
        if not isinstance(weight_map, dict):
            if content is not None:
                problems.append(Problem(str(self.path / INDEX), "weight_map", "is missing or not a mapping."))
            return {}
        files: dict[str, set[str] | None] = {}
        refused: set[str] = set()
        for name, file in weight_map.items():
            if not isinstance(file, str) or not _bare(file):
                refused.add(repr(file))
                continue
            known = files.setdefault(file, set())
            assert known is not None
            known.add(name)
        problems += [
            Problem(str(self.path / INDEX), file, "is not the bare name of a file in this directory. Do not load it.")
            for file in sorted(refused)[:_SHOWN]
        ]
        return files

    def _outside(self, path: Path) -> str | None:
        if not path.is_file():
            return "is a link to nothing: the download is not complete." if path.is_symlink() else "is missing."
        here, there = self.path.resolve(), path.resolve().parent
        # A download cache has its files as blobs/HASH, and in snapshots/COMMIT links to them.
        blobs = here.parent.parent / "blobs" if here.parent.name == "snapshots" else here
        if there not in (here, blobs):
            return "is a link that leads out of the directory; copy the file itself (cp -rL)."
        return None

    def _take(self, path: Path, entries: list[StoredEntry], expected: set[str] | None, problems: list[Problem]) -> None:
        twice = [entry.name for entry in entries if entry.name in self._entries]
        strangers = [
            entry.name
            for entry in entries
            if expected is not None and entry.name not in expected and not may_be_surplus(entry.name)
        ]
        if twice:
            problems.append(many(path, twice, "tensors are in another file too"))
        if strangers:
            problems.append(many(path, strangers, "tensors are not in the index, or are there for another file"))
        for entry in entries:
            self._entries.setdefault(entry.name, entry)
            self._files.setdefault(entry.name, path)

    def _plain_config(self) -> dict[str, Any]:
        """config.json without ``quantization_config``: quantized weights are refused unless a subclass reads them."""
        assert self.config is not None
        if (told := self.config.get(QUANTIZATION)) is not None:
            kind = told.get("quant_method") if isinstance(told, dict) else told
            fix = (
                "is not supported here: the weights are quantized, and what they were before is lost. Name the "
                "directory or checkpoint they were made from; mq convert verify and inspect read quantized ones."
            )
            raise ConversionError(Problem(f"{self.path / CONFIG}: {QUANTIZATION}", kind, fix))
        return self.config

    def _find_quantized(self, model: ModelConfig, problems: list[Problem]) -> None:
        """Where weights may be quantized, gathers the tensors that make one up; here there are none."""

    def _far_off(self, model: ModelConfig) -> list[Problem]:
        """Whether config.json names so many more tensors than there are that listing them would fill the memory."""
        named = count_hf_tensors(model)
        if named > len(self._entries) + _MOST_MISSING:
            fix = f"config.json names {named:,} tensors, the files hold {len(self._entries):,}: they do not match."
            return [Problem(str(self.path), None, fix)]
        return []

    def _misfits(self, model: ModelConfig, *, mixed: bool) -> list[Problem]:
        """How the tensors differ from those that config.json names."""
        expected = {item.name: item.shape for item in hf_tensors(model)}
        if model.share_embeddings_and_output_weights and EMBEDDING not in self._entries and HEAD in self._entries:
            # safetensors' save_model keeps one name of a tensor that has two; transformers ties the other to it.
            self._entries[EMBEDDING] = self._entries.pop(HEAD)
            self._files[EMBEDDING] = self._files.pop(HEAD)
            self.read_as.append(f"{HEAD} is read as {EMBEDDING}, to which it is tied: only one of them is stored")
        found = self._without_surplus(expected)
        if missing := sorted(expected.keys() - self._entries.keys()):
            found.append(many(self.path, missing, "tensors that config.json names are missing"))
        if extra := sorted(self._entries.keys() - expected.keys()):
            found.append(many(self.path, extra, "tensors do not belong to the model that config.json names"))
        for name in sorted(expected.keys() & self._entries.keys()):
            entry = self._entries[name]
            if entry.shape != expected[name]:
                fix = f"has the shape {list(entry.shape)} where config.json says {list(expected[name])}."
                found.append(Problem(str(self._files[name]), name, fix))
            if entry.dtype not in FORMATS:
                fix = f"has the dtype {entry.dtype}; bfloat16, float16 and float32 can be converted."
                found.append(Problem(str(self._files[name]), name, fix))
        formats = Counter(entry.dtype for entry in self._entries.values())
        if len(formats) > 1 and not mixed:
            rarest = min(formats, key=lambda dtype: formats[dtype])
            names = [name for name, entry in self._entries.items() if entry.dtype == rarest]
            fix = f"tensors have the dtype {rarest} and others do not; give --dtype to convert all to one"
            found.append(many(self.path, names, fix))
        return found

    def _without_surplus(self, expected: Mapping[str, object]) -> list[Problem]:
        """Leaves out tensors that change nothing, and returns what is wrong with those that would."""
        extra = [(name, entry.shape) for name, entry in self._entries.items() if name not in expected]
        if EMBEDDING not in self._entries:  # there is nothing to compare it with
            extra = [(name, shape) for name, shape in extra if name != HEAD]
        left_out, found = [], []
        for name, fault in surplus_faults(self, extra, self.architecture):
            if fault is not None:
                found.append(Problem(str(self._files[name]), name, fault))
            else:
                left_out.append(name)
            del self._entries[name]
        for name in left_out:
            del self._files[name]
        if left_out:
            self.passed_over.append(f"tensors that change nothing: {', '.join(left_out[:_SHOWN])}")
        return found


def _is_there(path: Path) -> bool:
    """Whether a directory has an entry of a name, be it a link to nothing."""
    return path.exists() or path.is_symlink()


def _bare(name: str) -> bool:
    return bool(name) and Path(name).name == name and not set(name) & {"\0", "\\", "/"} and name not in (".", "..")


def many(where: Path, names: Iterable[str], fix: str) -> Problem:
    """One problem of many tensors: their number, what is wrong with them, and the names of the first."""
    names = list(names)
    shown = ", ".join(name[:120] for name in names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return Problem(str(where), f"{len(names)}", f"{fix}: {shown}.")


def read_json(path: Path, problems: list[Problem]) -> dict[str, Any] | None:
    """A JSON object of at most 64 MiB; None, and a problem, where a file holds none."""
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_JSON + 1)
        if len(data) > _LARGEST_JSON:
            raise ValueError
        content = json.loads(data)
        if not isinstance(content, dict):
            raise TypeError
    except FileNotFoundError:
        problems.append(Problem(str(path), None, "is missing."))
    except OSError as error:
        problems.append(Problem(str(path), None, f"cannot be read ({error.strerror})."))
    except (ValueError, TypeError, RecursionError):
        problems.append(Problem(str(path), None, what_it_is(path) or "is not a JSON object, or is too large: damaged."))
    else:
        return content
    return None
