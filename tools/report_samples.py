"""Answers to fixed prompts over a run, for its page: of each prompt the first, the middle and the last."""

import html
from pathlib import Path

from megatron_qwen.json_lines import objects


def samples_html(path: Path) -> str:
    """A table of samples.jsonl; empty where there is none."""
    if not path.is_file():
        return ""
    found: dict[str, list[tuple[int, str]]] = {}
    for line in objects(path.read_bytes().splitlines()):
        if isinstance(line.get("iteration"), int):
            found.setdefault(str(line.get("prompt")), []).append((line["iteration"], str(line.get("text"))))
    rows = []
    for prompt, answers in found.items():
        shown = [answers[at] for at in sorted({0, len(answers) // 2, len(answers) - 1})]
        for number, (iteration, text) in enumerate(shown):
            first = f'<td rowspan="{len(shown)}">{html.escape(prompt)}</td>' if number == 0 else ""
            rows.append(f"<tr>{first}<td>{iteration}</td><td>{html.escape(text)}</td></tr>")
    head = "<tr><th>prompt</th><th>step</th><th>answer</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>" if rows else ""
