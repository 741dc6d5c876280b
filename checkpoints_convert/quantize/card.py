"""README.md of a quantized release and of a folder of them: what it is, how large, how to load it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from checkpoints_convert.model_card import commit_text, parameters_text, shape_text
from checkpoints_convert.model_source import ModelSource
from checkpoints_convert.progress import gb
from checkpoints_convert.quantize.names import AWQ, GPTQ, IMPORTANCE, NEAREST, SMOOTHQUANT
from checkpoints_convert.quantize.padding import padding_between
from megatron_qwen.config.run import Architecture
from megatron_qwen.data.tokenizers.release import AUTO
from megatron_qwen.provenance import code_version

_METHODS = {
    NEAREST: "rounded to nearest, without data",
    GPTQ: "GPTQ (https://arxiv.org/abs/2210.17323)",
    AWQ: "AWQ (https://arxiv.org/abs/2306.00978)",
    SMOOTHQUANT: "SmoothQuant (https://arxiv.org/abs/2211.10438)",
    IMPORTANCE: "with an importance matrix, as llama.cpp's imatrix",
}
_FORMATS = {
    "gptq": "GPTQ, {bits} bits, groups of {group_size}, {symmetry}, `{checkpoint_format}`",
    "awq": "AWQ {version}, {bits} bits, groups of {group_size}, with zero points",
    "compressed-tensors": "compressed-tensors, {format}",
    "fp8": "FP8 {fmt}, blocks of {weight_block_size}",
    "gguf": "GGUF, {kind}",
}
# Packages with which transformers loads a format, and the engines whose documents name it.
_PACKAGES = {
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel",),
    "compressed-tensors": ("compressed-tensors",),
    "fp8": ("accelerate",),
    "gguf": ("gguf",),
}
_OTHER_READERS = {
    "gptq": "gptqmodel, vLLM, SGLang",
    "awq": "gptqmodel, vLLM, SGLang",
    "compressed-tensors": "vLLM, SGLang",
    "fp8": "vLLM, SGLang",
    "gguf": "llama.cpp, Ollama",
}


@dataclass(frozen=True)
class ReleaseFacts:
    """What a card and the table of a folder say of a release.

    Args:
        format_name: as on the command line.
        config: its ``quantization_config``.
        method: what made the values.
        size: bytes of all weight files.
        bits: bits on the disk for each weight.
    """

    format_name: str
    config: Mapping[str, Any]
    method: str
    size: int
    bits: float

    @property
    def description(self) -> str:
        """The format in words."""
        known = {**self.config, "symmetry": "symmetric" if self.config.get("sym") else "asymmetric"}
        block = known.get("weight_block_size")
        known["weight_block_size"] = " x ".join(map(str, block)) if isinstance(block, list) else ""
        return _FORMATS[str(self.config["quant_method"])].format(**known)

    @property
    def packages(self) -> str:
        """What transformers needs to load it."""
        return ", ".join(_PACKAGES[str(self.config["quant_method"])])

    @property
    def readers(self) -> str:
        """Programs that read it."""
        return f"transformers with {self.packages}; {_OTHER_READERS[str(self.config['quant_method'])]}"


def quantized_card(
    source: ModelSource,
    facts: ReleaseFacts,
    *,
    name: str,
    architecture: Architecture,
    model_class: str,
    dtype: str,
    tokenizer_class: str | None,
    license_: str | None,
) -> str:
    """The card of a release, with the front matter that model hubs read.

    Args:
        source: what was quantized.
        facts: format, method and size.
        name: of the release.
        architecture: of the release, with its padding.
        model_class: transformers' class.
        dtype: of the tensors that are not quantized.
        tokenizer_class: transformers' class that loads the tokenizer; None where that was not tried.
        license_: SPDX-like identifier; None leaves the field for the releasing person.
    """
    front = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"license: {license_}" if license_ else "license: other  # to be decided by whoever releases this",
        f"base_model: {source.name}",
        "base_model_relation: quantized",
        "---",
    ]
    rows = [
        ("Base model", f"`{source.name}`"),
        ("Format", f"{facts.format_name}: {facts.description}"),
        ("Method", _METHODS[facts.method]),
        ("Size", f"{gb(facts.size)}, {facts.bits:.2f} bits a weight, embeddings included"),
        ("Not quantized", f"embeddings, output layer, norms, biases, routers: {dtype}"),
        ("Architecture", f"`{model_class}`, {shape_text(architecture.model, architecture.rope)}"),
        ("Parameters", parameters_text(architecture.model)),
        ("Conversion code", commit_text(code_version())),
    ]
    if padded := _padded(source, architecture):
        rows.insert(4, ("Padding", padded))
    table = ["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)]
    loader = tokenizer_class or AUTO
    use = [
        f"transformers loads it with {facts.packages} installed:",
        "",
        "```python",
        f"from transformers import AutoModelForCausalLM, {loader}",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")',
        f'tokenizer = {loader}.from_pretrained("{name}")',
        "```",
        "",
        f"By their documents these engines read the format, too: {_OTHER_READERS[str(facts.config['quant_method'])]}.",
        "",
        "`manifest.json` holds the SHA-256 of every file and a hash of every tensor.",
    ]
    return "\n".join([*front, "", f"# {name}", "", *table, "", *use, ""])


def _padded(source: ModelSource, architecture: Architecture) -> str | None:
    padding = padding_between(source.model, architecture.model)
    return f"{padding.told(source.model)}, with zeros: the model computes the same" if padding.widths else None


def folder_card(
    source: ModelSource, releases: Sequence[tuple[str, ReleaseFacts]], *, kept: Sequence[str] = (), license_: str | None
) -> str:
    """README.md of a folder of releases: a line each.

    Args:
        source: what was quantized.
        releases: directory and facts of each.
        kept: lines of other releases, from an earlier card.
        license_: SPDX-like identifier, if it is decided.
    """
    head = [f"# {source.name}, quantized", ""]
    head += [f"Licence: {license_}.", ""] if license_ else []
    table = ["| release | format | method | size | bits a weight | read by |", "|---|---|---|---|---|---|"]
    for name, facts in releases:
        method = _METHODS[facts.method]
        cells = (f"[{name}]({name})", facts.description, method, gb(facts.size), f"{facts.bits:.2f}", facts.readers)
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join([*head, *table[:2], *sorted([*table[2:], *kept]), ""])
