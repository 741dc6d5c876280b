"""README.md of an exported model: what it is, what it was trained on, where it comes from."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints_convert.checkpoint_source import CheckpointSource
from megatron_qwen.checkpoint.lora_base import noted
from megatron_qwen.config.lora import targets
from megatron_qwen.config.sections import ModelConfig, RopeConfig
from megatron_qwen.estimate.parameters import count_parameters
from megatron_qwen.provenance import code_version

_UNKNOWN = "not recorded"
_SOURCES_SHOWN = 10
_CHAT = [
    "",
    'turns = [{"role": "user", "content": "Who are you?"}]',
    'prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
    "answer = model.generate(**prompt)[0, prompt.input_ids.shape[1] :]",
    "print(tokenizer.decode(answer, skip_special_tokens=True))",
]


def model_card(
    source: CheckpointSource,
    *,
    name: str,
    architecture: str,
    tokenizer_class: str,
    dtype: str,
    license_: str | None,
    checkpoint: Mapping[str, Any],
    data: Sequence[Mapping[str, Any]],
) -> str:
    """The card, with the front matter that model hubs read.

    Args:
        source: the checkpoint.
        name: of the model.
        architecture: transformers' class.
        tokenizer_class: transformers' class that loads the tokenizer.
        dtype: format of the weights.
        license_: SPDX-like identifier; None leaves the field for the releasing person.
        checkpoint: which one, as origin.py tells it.
        data: what it was trained on, as origin.py tells it.
    """
    config = source.config
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    front.append(f"license: {license_}" if license_ else "license: other  # to be decided by whoever releases this")
    rows = [
        ("Architecture", f"`{architecture}`, {shape_text(config.model, config.rope)}"),
        ("Parameters", parameters_text(config.model)),
        ("Weights", dtype),
        ("Tokens seen", _tokens(source)),
        ("Iteration", f"{source.iteration:,}"),
        ("Sequence length in training", f"{config.data.seq_length:,}"),
        ("Data", _data(data)),
        ("Validation loss", _validation_loss(source)),
        *_stage(source),
        ("Checkpoint", _checkpoint(checkpoint)),
        ("Training code", commit_text(source.state.get("code"))),
        ("Conversion code", commit_text(code_version())),
    ]
    table = ["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)]
    use = [
        "```python",
        f"from transformers import AutoModelForCausalLM, {tokenizer_class}",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")',
        f'tokenizer = {tokenizer_class}.from_pretrained("{name}")',
        *(_CHAT if config.objective.kind != "pretrain" else []),
        "```",
    ]
    proof = (
        "`manifest.json` holds the SHA-256 of every file and a hash of every tensor; "
        f"`mq convert verify {shlex.quote(name)} {shlex.quote(f'{name}/manifest.json')}` compares them."
    )
    return "\n".join([*front, "---", "", f"# {name}", "", *table, "", *use, "", proof, ""])


def _stage(source: CheckpointSource) -> list[tuple[str, str]]:
    """What the last stage of training was, and its scores."""
    rows = []
    config = source.config
    began = f", from `{_run_name(Path(config.checkpoint.load))}`" if config.checkpoint.load else ""
    if config.objective.kind == "sft":
        rows.append(("Stage", f"supervised fine-tuning, mean over {config.objective.average}s{began}"))
    elif config.objective.of_pairs:
        how = f" with {config.objective.dpo_loss} loss" if config.objective.kind == "dpo" else ""
        what = f"preferences between answers, {config.objective.kind}{how}, beta {config.objective.beta:g}"
        rows.append(("Stage", what + began))
    base = noted(source.state)
    if base is not None:
        names = ", ".join(target.name for target in targets(config.lora, config.model))
        into = f"merged into `{_run_name(Path(base.path))}`, manifest xxh3-128 `{base.digest}`"
        rows.append(("Adapters", f"LoRA of rank {config.lora.rank} on {names}, {into}"))
    found: dict[str, float] = {}
    for record in _records(source):
        found |= {
            name: float(value)
            for name, value in record.items()
            if (name.startswith("eval/") or name == "validation_end_probability") and isinstance(value, int | float)
        }
    rows += [(f"`{name}`", f"{value:.4f}") for name, value in sorted(found.items())]
    return rows


def _run_name(path: Path) -> str:
    """Name of the run whose directory, checkpoints or iteration a path is."""
    parts = path.parts
    return parts[parts.index("checkpoints") - 1] if "checkpoints" in parts[1:] else path.name


def shape_text(model: ModelConfig, rope: RopeConfig) -> str:
    """The sizes of a model in a line."""
    parts = [
        f"{model.num_layers} layers",
        f"hidden size {model.hidden_size:,}",
        f"{model.num_attention_heads} query and {model.num_query_groups} key/value heads of {model.head_dim}",
    ]
    if model.is_moe:
        parts.append(
            f"{model.num_moe_experts} experts of {model.moe_ffn_hidden_size:,}, {model.moe_router_topk} chosen"
        )
        if model.moe_shared_expert_intermediate_size:
            parts.append(f"a shared expert of {model.moe_shared_expert_intermediate_size:,}")
    else:
        parts.append(f"feed-forward {model.ffn_hidden_size:,}")
    parts.append(f"vocabulary {model.vocab_size:,}" + (", tied" if model.share_embeddings_and_output_weights else ""))
    return ", ".join([*parts, f"RoPE base {rope.base:,.0f}", f"{model.max_position_embeddings:,} positions"])


def parameters_text(model: ModelConfig) -> str:
    """Its parameters in a line."""
    count = count_parameters(model)
    active = f", {count.active:,} active" if model.is_moe else ""
    return f"{count.total:,}{active} ({count.without_embeddings:,} without embeddings)"


def _tokens(source: CheckpointSource) -> str:
    progress = source.state.get("progress")
    if isinstance(progress, dict) and isinstance(progress.get("consumed_tokens"), int):
        return f"{progress['consumed_tokens']:,}"
    arguments = source.common.get("args")
    samples, length = getattr(arguments, "consumed_train_samples", None), getattr(arguments, "seq_length", None)
    return f"{samples * length:,}" if isinstance(samples, int) and isinstance(length, int) else _UNKNOWN


def _data(sources: Sequence[Mapping[str, Any]]) -> str:
    """Sources by name, with what tells their tokens from others."""
    if not sources:
        return _UNKNOWN
    shown = []
    for source in sources[:_SOURCES_SHOWN]:
        known = [f"{source['tokens']:,} tokens"] if "tokens" in source else []
        known += [f"xxh3-128 `{source['xxh3_128']}`"] if source["xxh3_128"] else []
        shown.append(f"`{source.get('path', source['name'])}`" + (f" ({', '.join(known)})" if known else ""))
    more = len(sources) - len(shown)
    return "; ".join([*shown, *([f"and {more} more, in `manifest.json`"] if more else [])])


def _checkpoint(noted: Mapping[str, Any]) -> str:
    name = f"`{noted.get('path', noted['name'])}`" + (f" of `{noted['run']}`" if noted["run"] else "")
    return f"{name}, manifest xxh3-128 `{noted['xxh3_128']}`" if noted["verified"] else f"{name}, without a manifest"


def _validation_loss(source: CheckpointSource) -> str:
    """The newest one at or before the checkpoint, from the run's metrics."""
    newest: tuple[int, float] | None = None
    for record in _records(source):
        try:
            newest = (int(record["iteration"]), float(record["validation_loss"]))
        except (ValueError, KeyError, TypeError):
            continue
    return _UNKNOWN if newest is None else f"{newest[1]:.4f} nats per token (iteration {newest[0]:,})"


def _records(source: CheckpointSource) -> Iterator[dict[str, Any]]:
    """The run's metrics at or before the checkpoint, as far as they can be read."""
    path = (source.run_dir or Path()) / "metrics.jsonl"
    for line in path.read_text(errors="replace").splitlines() if source.run_dir and path.is_file() else []:
        try:
            record = json.loads(line)
            if isinstance(record, dict) and int(record["iteration"]) <= source.iteration:
                yield record
        except (ValueError, KeyError, TypeError):
            continue


def commit_text(code: object) -> str:
    """Version and commit of code that made something."""
    if not isinstance(code, dict):
        return _UNKNOWN
    commit = f" `{code['commit']}`" if code.get("commit") else ""
    return f"megatron_qwen {code.get('version')}{commit}" + (" with local changes" if code.get("modified") else "")
