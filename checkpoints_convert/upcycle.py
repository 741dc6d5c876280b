"""``mq convert upcycle``: an MoE model that starts from a dense model."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from checkpoints_convert.arguments import SHARD_BYTES
from checkpoints_convert.compare.sides import Side, open_side
from checkpoints_convert.compare.verify import compare_logits
from checkpoints_convert.conversion import Converted
from checkpoints_convert.new_checkpoint import NewCheckpoint, new_run, output_tensor, shards, write_checkpoint
from checkpoints_convert.output import OutputTensor, RowSpan
from checkpoints_convert.tensor_set import TensorSet
from checkpoints_convert.upcycle_plan import UpcyclePlan, plan
from megatron_qwen.config.checks import require_legal
from megatron_qwen.config.run import Architecture, RunConfig
from megatron_qwen.errors import ConfigError, ConversionError, Problem
from megatron_qwen.files import atomic_write_json
from megatron_qwen.hf.mapping import CoreTensor, core_tensors
from megatron_qwen.provenance import code_version

REPORT = "upcycle.json"


@dataclass(frozen=True)
class UpcycleOptions:
    """How to upcycle.

    Args:
        seed: of the router's rows.
        router_std: of the router's rows; None chooses.
        routed_share: part of the output that the routed experts give where the shared expert holds the whole too.
        compare: run both models on prompts and say how far their logits are apart.
        workers: shards written at a time.
        restart: throw away an unfinished conversion of something else to the same place.
        quiet: show no progress.
    """

    seed: int = 1234
    router_std: float | None = None
    routed_share: float = 0.5
    compare: bool = True
    workers: int = 2
    restart: bool = False
    quiet: bool = False


def upcycle(dense: Side, out: Path, recipe: RunConfig, options: UpcycleOptions) -> tuple[Converted, dict[str, Any]]:
    """Writes a checkpoint of the MoE model.

    Args:
        dense: a checkpoint or a Hugging Face directory.
        out: the directory to make.
        recipe: whose experts are taken.
        options: how.

    Returns:
        What was done, and the report: the plan in words, whether it is exact, the logits of both models.

    Raises:
        ConversionError: the shapes do not go together; every mismatch is named.
    """
    if dense.tensors is None:
        raise ConversionError(Problem(str(dense.path), None, "is a manifest: it holds no weights."))
    cut = plan(dense.model, recipe.model, router_std=options.router_std, routed_share=options.routed_share)
    formats = {info.dtype for info in dense.tensors.tensors.values()}
    if len(formats) > 1:
        raise ConversionError(
            Problem(str(dense.path), None, "has weights of several formats; convert it to one first.")
        )
    dtype = formats.pop()
    if options.router_std is not None and not 0 <= options.router_std < 1e3:
        raise ConfigError(Problem("--router-std", options.router_std, "must be a small number, at least 0."))
    architecture = Architecture(model=cut.model, rope=dense.architecture.rope)
    config = new_run(architecture, out, dtype=dtype, tokenizer=dense.tokenizer_dir is not None)
    require_legal(config)
    cutter = Cutter(dense, cut, seed=options.seed)
    outputs = [cutter.output_tensor(item, dtype) for item in core_tensors(cut.model)]
    note = {
        "kind": "upcycled",
        "path": str(dense.path.absolute()),
        "dense": dense.kind,
        "plan": {key: value for key, value in asdict(cut).items() if key != "model"},
        "seed": options.seed,
    }
    identity = {
        **note,
        "out": str(out.absolute()),
        "digest": _digest(dense),
        **asdict(architecture),
        "code": code_version(),
    }
    files = shards(outputs, limit=SHARD_BYTES)
    checkpoint = NewCheckpoint(out, config, files, dense.tokenizer_dir, note, identity)
    done = write_checkpoint(checkpoint, workers=options.workers, restart=options.restart, quiet=options.quiet)
    report: dict[str, Any] = {"exact": cut.exact, "nearly": cut.nearly, "notes": list(cut.notes), "logits": None}
    if options.compare:
        dtype_name = "fp32"
        found = compare_logits(dense, open_side(out), prompts=(), dtype=dtype_name, quiet=options.quiet)
        report["logits"] = found.as_json()
    atomic_write_json(out / REPORT, report)
    return done, report


def _digest(dense: Side) -> str:
    from checkpoints_convert.hf_directory import HfDirectory

    if dense.checkpoint is not None:
        return dense.checkpoint.digest()
    assert isinstance(dense.tensors, HfDirectory)
    return dense.tensors.digest()


class Cutter:
    """Makes the tensors of an MoE model's weights from a dense model's.

    Args:
        dense: the dense model.
        cut: what goes where.
        seed: of the router's rows.
    """

    def __init__(self, dense: Side, cut: UpcyclePlan, *, seed: int) -> None:
        assert dense.tensors is not None
        self._tensors: TensorSet = dense.tensors
        self._cut, self._seed, self._ffn = cut, seed, dense.model.ffn_hidden_size

    def output_tensor(self, item: CoreTensor, dtype: torch.dtype) -> OutputTensor:
        """One weight of the MoE model."""
        return output_tensor(
            item, dtype, [self._piece(item.names[part], part, span) for part, span in item.mapping.origin()]
        )

    def _piece(self, name: str, part: int, span: tuple[int, int]) -> RowSpan:
        first, last = span
        read = self._reader(name)
        # An expert's output matrix takes some columns of rows that are read whole, in fp32.
        wide = 4 * self._ffn if name.endswith("down_proj.weight") else 0
        return RowSpan(last - first, lambda start, stop: read(first + start, first + stop), row_bytes=wide)

    def _reader(self, name: str) -> Callable[[int, int], torch.Tensor]:
        """What gives rows of a Hugging Face tensor of the MoE model."""
        before, mlp, rest = name.partition(".mlp.")
        if not mlp:
            return lambda start, stop: self._tensors.rows(name, start, stop)
        words = rest.split(".")
        if words[0] == "experts":
            channels, scale = self._cut.channels(int(words[1])), self._cut.routed_scale
            return self._expert(f"{before}.mlp.{words[2]}.weight", channels, scale)
        if words[0] == "shared_expert":
            width = self._cut.model.moe_shared_expert_intermediate_size or 0
            limit = self._cut.shared_channels
            return self._expert(f"{before}.mlp.{words[1]}.weight", (0, width), self._cut.shared_scale, limit=limit)
        hidden = self._cut.model.hidden_size
        if words[0] == "shared_expert_gate":
            return lambda start, stop: torch.zeros(stop - start, hidden)
        assert words[0] == "gate", name
        return lambda start, stop: torch.stack([self._router_row(before, expert) for expert in range(start, stop)])

    def _expert(
        self, dense: str, channels: tuple[int, int], scale: float, *, limit: int | None = None
    ) -> Callable[[int, int], torch.Tensor]:
        """Rows of an expert's matrix, from the dense one.

        Channels beyond the dense width pad an expert: their input rows repeat the first ones, so that they can learn,
        and their output columns are zero.
        """
        first, last = channels
        end = self._ffn if limit is None else limit
        if dense.endswith("down_proj.weight"):

            def columns(start: int, stop: int) -> torch.Tensor:
                rows = self._tensors.rows(dense, start, stop)
                result = torch.zeros(stop - start, last - first, dtype=torch.float32)
                inside = max(0, min(last, end) - first)
                result[:, :inside] = rows[:, first : first + inside].float() * scale
                return result

            return columns

        def rows(start: int, stop: int) -> torch.Tensor:
            low, high = first + start, first + stop
            parts = []
            while low < high:
                wrapped = low if low < end else low % self._ffn
                count = min(high - low, (end if low < end else self._ffn) - wrapped)
                parts.append(self._tensors.rows(dense, wrapped, wrapped + count))
                low += count
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return rows

    def _router_row(self, layer: str, expert: int) -> torch.Tensor:
        """One row a group of experts, drawn from a generator of its own."""
        key = f"{self._seed}/upcycle/{layer}/{self._cut.group(expert)}"
        generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(key.encode()) & (2**63 - 1))
        return torch.empty(self._cut.model.hidden_size).normal_(0.0, self._cut.router_std, generator=generator)
