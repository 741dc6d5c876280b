"""README.md of a directory of GGUF files."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoints_convert.formats.gguf.plan import PlannedKind
from checkpoints_convert.progress import gb
from megatron_qwen.provenance import code_version


def gguf_card(
    planned: Sequence[PlannedKind],
    *,
    name: str,
    directory: str,
    license_: str | None,
    importances: bool,
    source: Mapping[str, Any],
) -> str:
    """The card, with the front matter that model hubs read.

    Args:
        planned: the files.
        name: of the model.
        directory: its last component.
        license_: SPDX-like identifier; None leaves the field for the releasing person.
        importances: whether an importance matrix was used.
        source: what was quantized, as the manifest names it.
    """
    front = ["---", "library_name: gguf", "pipeline_tag: text-generation"]
    front.append(f"license: {license_}" if license_ else "license: other  # to be decided by whoever releases this")
    table = ["| kind | bits a weight | size | files |", "|---|---|---|---|"]
    for item in planned:
        first, more = item.files[0].name, len(item.files) - 1
        shown = f"`{first}`" + (f" and {more} more" if more else "")
        table.append(f"| {item.kind.name} | {item.bits_per_weight:.2f} | {gb(item.size)} | {shown} |")
    code = code_version()
    commit = f" `{code['commit']}`" if code.get("commit") else ""
    said = "with an importance matrix" if importances else "without data"
    made = f"Quantized {said} from `{source['name']}` (xxh3-128 `{source['xxh3_128']}`)"
    use = ["```", f'llama-cli -m {shlex.quote(planned[0].files[0].name)} -p "Once upon a time"', "```"]
    proof = (
        "`manifest.json` holds the SHA-256 of every file; "
        f"`mq convert verify {shlex.quote(directory)} {shlex.quote(f'{directory}/manifest.json')}` compares them."
    )
    made = f"{made} by megatron_qwen {code.get('version')}{commit}."
    return "\n".join([*front, "---", "", f"# {name}", "", *table, "", *use, "", made, "", proof, ""])
