"""``mq data ledger``: what a run has read, and which samples a step saw."""

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_qwen.errors import CheckpointError, ConfigError, Problem

_SHOWN_CHARACTERS = 200


def main(options: argparse.Namespace) -> int:
    """Shows the ledger of the newest checkpoint, or the samples of a step."""
    from megatron_qwen.checkpoint import find
    from megatron_qwen.checkpoint.paths import RUN_YAML, STATE
    from megatron_qwen.config.source import resolve
    from megatron_qwen.recipes.registry import RECIPES
    from megatron_qwen.rundir import RunDirectory

    directory = RunDirectory(options.run)
    if not directory.run_yaml.is_file():
        raise ConfigError(Problem("run", options.run, "is not a run directory: it has no run.yaml."))
    newest = find.resolve(directory.checkpoints)[0]
    state = json.loads((newest.path / STATE).read_text())
    if "data" not in state:
        raise CheckpointError(Problem(str(newest.path), None, "has no ledger: an older version wrote it."))
    if options.step is None:
        return _show(state, as_json=options.json)
    config = resolve(str(newest.path / RUN_YAML), [], RECIPES)
    samples = _samples_of(options.step, directory.metrics)
    found = _replay(config, state["data"], samples, options)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for one in found:
        print(f"sample {one['sample']}  source {one['source']}  {'; '.join(one['places'])}")
        if "text" in one:
            print(f"  {one['text'][:_SHOWN_CHARACTERS]!r}")
    return 0


def _show(state: dict[str, Any], *, as_json: bool) -> int:
    phases = state["data"]["phases"]
    sources = state["data"]["sources"]
    read: dict[str, int] = {}
    rows = []
    for phase in phases:
        for name, count in phase["counts"].items():
            tokens = count * phase["seq_length"]
            read[name] = read.get(name, 0) + tokens
            rows.append(
                {
                    "stage": phase["stage"],
                    "first_sample": phase["first_sample"],
                    "seq_length": phase["seq_length"],
                    "source": name,
                    "weight": phase["weights"][name],
                    "samples": count,
                    "tokens": tokens,
                    "epochs_so_far": read[name] / sources[name]["tokens"],
                }
            )
    progress = state["progress"]
    if as_json:
        print(json.dumps({"consumed_samples": progress["consumed_samples"], "phases": rows}, indent=2))
        return 0
    print(f"{progress['consumed_samples']:,} samples, {progress['consumed_tokens']:,} tokens, {len(phases)} phases")
    print(
        f"{'stage':<14}{'from sample':>14}{'length':>9}  {'source':<20}{'weight':>8}{'samples':>13}{'tokens':>18}"
        f"{'epochs':>8}"
    )
    for row in rows:
        print(
            f"{row['stage']:<14}{row['first_sample']:>14,}{row['seq_length']:>9,}  {row['source']:<20}"
            f"{100 * row['weight']:>7.2f}%{row['samples']:>13,}{row['tokens']:>18,}{row['epochs_so_far']:>8.3f}"
        )
    return 0


def _samples_of(step: int, metrics: Path) -> range:
    """The numbers of the samples that a step saw, as metrics.jsonl tells."""
    from megatron_qwen.json_lines import objects

    with metrics.open("rb") as lines:
        for record in objects(lines):
            if record.get("iteration") == step:
                end = int(record["consumed_samples"])
                return range(end - int(record["global_batch_size"]), end)
    raise ConfigError(Problem("--step", step, f"is not in {metrics}: the run has not done this step."))


def _replay(config: Any, ledger: dict[str, Any], samples: range, options: argparse.Namespace) -> list[dict[str, Any]]:
    from megatron_qwen.data.reading.replay import Replay
    from megatron_qwen.data.tokenizers.tokenizer import load_tokenizer

    replay = Replay(config, ledger)
    tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
    found = []
    for number in samples:
        name, runs, sample = replay[number]
        tokens = replay.source(name).tokens
        places = [place for begin, end in runs for place in tokens.places(begin, end)]
        entry: dict[str, Any] = {"sample": number, "source": name, "places": places}
        if tokenizer is not None:
            entry["text"] = tokenizer.decode(sample.tokens.tolist())
        found.append(entry)
    return found
