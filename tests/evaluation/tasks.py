"""Tasks of the harness on data of this machine: the standard library's own text."""

import json
import random
from pathlib import Path

from launch.demo import standard_library

CHOICE, ANSWER, TEXT = "local_choice", "local_answer", "local_text"
WRITTEN = "local_written"  # measured by what was written, where accuracy of a tiny model is 0 whatever it writes
_LINES, _LONGEST = 6, 60
_FILES = {
    CHOICE: """
        fewshot_split: test
        output_type: multiple_choice
        doc_to_text: "{{context}}\\n"
        doc_to_choice: choices
        doc_to_target: gold
        num_fewshot: 2
        metric_list:
          - {metric: acc, aggregation: mean, higher_is_better: true}
          - {metric: acc_norm, aggregation: mean, higher_is_better: true}
        """,
    ANSWER: """
        fewshot_split: test
        output_type: generate_until
        doc_to_text: "{{context}}\\n"
        doc_to_target: answer
        num_fewshot: 1
        generation_kwargs: {until: ["\\n"], max_gen_toks: 12}
        metric_list:
          - {metric: exact_match, aggregation: mean, higher_is_better: true}
        """,
    WRITTEN: """
        fewshot_split: test
        output_type: generate_until
        doc_to_text: "{{context}}\\n"
        doc_to_target: answer
        num_fewshot: 1
        generation_kwargs: {until: ["\\n"], max_gen_toks: 12}
        process_results: !function written.measure
        metric_list:
          - {metric: sum_of_characters, aggregation: mean, higher_is_better: true}
        """,
    TEXT: """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list:
          - {metric: word_perplexity}
          - {metric: byte_perplexity}
          - {metric: bits_per_byte}
        """,
}


def write_tasks(folder: Path, *, items: int, repeats: int = 2) -> Path:
    """A directory of three tasks: choosing a line, writing one, and the likelihood of texts.

    Args:
        folder: to make.
        items: of each task.
        repeats: of the lines in a text, to reach over the end of a window.
    """
    folder.mkdir()
    dice = random.Random(0)
    lines = [line for text in standard_library(900_000) for line in _lines(text)]
    groups = [lines[at : at + _LINES] for at in range(0, len(lines) - _LINES, _LINES)]
    dice.shuffle(groups)
    assert len(groups) >= items
    records: dict[str, list[dict[str, object]]] = {name: [] for name in _FILES}
    for group in groups[:items]:
        *context, last = group
        gold = dice.randrange(4)
        choices = [dice.choice(groups)[-1] for _ in range(3)]
        records[CHOICE].append(
            {"context": "\n".join(context), "choices": [*choices[:gold], last, *choices[gold:]], "gold": gold}
        )
        for name in (ANSWER, WRITTEN):
            records[name].append({"context": "\n".join(context[:3]), "answer": context[3]})
        records[TEXT].append({"text": "\n".join(group * repeats)})
    (folder / "written.py").write_text(
        "def measure(doc, results):\n    return {'sum_of_characters': sum(map(ord, results[0]))}\n"
    )
    for name, rule in _FILES.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records[name]))
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        body = "\n".join(line[8:] for line in rule.strip("\n").splitlines())
        (folder / f"{name}.yaml").write_text(f"{head}{body}\nmetadata: {{version: 1}}\n")
    return folder


def _lines(document: dict[str, str]) -> list[str]:
    return [line[:_LONGEST] for line in document["text"].splitlines() if len(line.strip()) > 20]
