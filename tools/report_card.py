"""The performance card of a run as a part of ``mq report``."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_qwen.estimate.save_interval import SaveInterval
from megatron_qwen.metrics.console import duration

STYLE = """
.bar { display: flex; height: 1.5rem; border-radius: .35rem; overflow: hidden; margin: .9rem 0 .5rem }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .88rem; font-variant-numeric: tabular-nums }
.legend i { display: inline-block; width: .75rem; height: .75rem; border-radius: .15rem; margin-right: .4rem }
.note { color: #5b6472; font-size: .88rem }
"""
_GOODPUT = {
    "steps_s": ("steps that count", "#1f4e8c"),
    "steps_done_again_s": ("steps done again", "#c2452d"),
    "steps_skipped_s": ("steps skipped", "#e08a76"),
    "data_wait_s": ("waits for data", "#d8a13a"),
    "save_s": ("saves", "#7a5ea8"),
    "validation_s": ("validation", "#5a9a8b"),
    "evaluation_s": ("evaluation", "#3f7f72"),
    "startup_s": ("start-up", "#8fa3bf"),
    "between_attempts_s": ("between attempts", "#b9bec6"),
    "other_s": ("other", "#dfe3e8"),
}
_MEMORY = {
    "weights_gib": ("weights", "#1f4e8c"),
    "gradients_gib": ("gradients", "#5a9a8b"),
    "optimizer_gib": ("optimizer", "#7a5ea8"),
    "activations_and_workspace_gib": ("activations, workspace, libraries", "#d8a13a"),
}


def read_card(path: Path) -> dict[str, Any] | None:
    """performance.json; None where it is missing or unreadable."""
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return card if isinstance(card, dict) else None


def card_html(card: dict[str, Any]) -> str:
    """The card: what was reached and by which count, where the time and the memory went, what the preset chose."""
    return "".join(
        (
            _reached(card),
            _share_bar("Where the time went", card.get("goodput") or {}, _GOODPUT, duration),
            _saving(card.get("saving")),
            _share_bar("Memory of the fullest rank", card.get("memory") or {}, _MEMORY, "{:.2f} GiB".format),
            _choices(card.get("choices") or {}),
        )
    )


def _saving(saving: dict[str, Any] | None) -> str:
    """What the interval of checkpoints loses, and which would lose the least."""
    try:
        return "" if saving is None else f'<p class="note">Predicted: {html.escape(str(SaveInterval(**saving)))}.</p>'
    except TypeError:  # of another version
        return ""


def _reached(card: dict[str, Any]) -> str:
    def figure(name: str, form: str) -> str:
        value = card.get(name)
        return "not measured" if value is None else form.format(value)

    peak = card.get("peak")
    precision = ", ".join(filter(None, (card.get("dtype"), card.get("fp8") and f"fp8 {card['fp8']}")))
    rows: Sequence[tuple[str, str]] = (
        ("devices", f"{card.get('devices')} x {card.get('device')}, backend {card.get('backend')}, {precision}"),
        ("tokens per second and device, median", figure("tokens_per_second_per_device", "{:,.0f}")),
        ("model FLOPs per token", figure("model_flops_per_token", "{:.4g}")),
        ("model TFLOP/s per device, median", figure("model_tflops_per_device", "{:,.3f}")),
        (
            "MFU",
            f"{figure('mfu', '{:.1%}')}; peak {figure('peak_tflops', '{:,.1f} TFLOP/s')}: {peak or 'none is known'}",
        ),
        ("routing of experts", str(card.get("routing"))),
        ("steps measured", figure("steps_measured", "{:,}")),
    )
    body = "".join(f"<tr><td>{name}</td><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{body}</table>"


def _share_bar(title: str, values: dict[str, Any], kinds: dict[str, tuple[str, str]], show: Any) -> str:
    """A stacked bar of the parts of a whole, and what each colour is."""
    parts = [(values.get(key) or 0.0, *kind) for key, kind in kinds.items()]
    whole = sum(size for size, _, _ in parts)
    if not whole:
        return ""
    pieces = "".join(
        f'<div style="width:{size / whole:.4%};background:{colour}" title="{name}"></div>'
        for size, name, colour in parts
    )
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{name} {show(size)} ({size / whole:.1%})</span>'
        for size, name, colour in parts
        if size
    )
    return f'<h3>{title}</h3><div class="bar">{pieces}</div><div class="legend">{legend}</div>'


def _choices(choices: dict[str, Any]) -> str:
    def row(field: str, choice: dict[str, Any]) -> str:
        cells = (field, json.dumps(choice.get("value")).strip('"'), choice.get("reason"))
        return "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>"

    body = "".join(row(field, choice) for field, choice in choices.items())
    return f"<h3>What performance.preset chose</h3><table>{body}</table>" if body else ""
