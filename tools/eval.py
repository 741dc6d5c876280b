"""``mq eval``: scores of a run, a checkpoint of any layout or a Hugging Face directory, and comparisons of two."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_qwen.cli import Parser, run_program
from megatron_qwen.errors import ConfigError, Problem
from tools.generation.options import add_model_options, load_options
from tools.generation.ranks import set_up_log, start_ranks

if TYPE_CHECKING:
    from megatron_qwen.distributed.rank import RankInfo
    from megatron_qwen.evaluation.tasks import Prepared


def parser() -> Parser:
    """The command line."""
    found = Parser(
        "mq eval",
        description="Scores a model in tasks of lm-evaluation-harness, with the modules that train, on the ranks of "
        "any layout. SOURCE is a run, a checkpoint root, one iteration, or a Hugging Face directory. Given two "
        "directories that --output has made, compares them. `mq eval fetch` brings test data here.",
        examples=[
            "mq eval runs/first --tasks arc_challenge --shots 25 --output scores/first",
            "mq eval out/first-hf --tasks ours --task-dir tasks --limit 100 --json",
            "mq eval runs/first parallel.tensor_model_parallel_size=2 --tasks hellaswag,winogrande",
            "mq eval scores/first scores/second",
            "mq eval fetch MMLU GSM8K HumanEval",
        ],
    )
    found.add_argument("source", type=Path, help="run, checkpoint root, one iteration, or Hugging Face directory")
    found.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="parallel.* for the layout; or a second directory"
    )
    found.add_argument("--tasks", default="", help="names or patterns of the harness's tasks, separated by commas")
    found.add_argument("--task-dir", action="append", type=Path, default=[], help="directory with task files (YAML)")
    found.add_argument("--limit", type=int, help="items of each task; default: all")
    found.add_argument("--shots", type=int, help="examples before each item; default: each task's own number")
    found.add_argument("--chat", action="store_true", help="prompts as turns of the tokenizer's chat template")
    found.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    found.add_argument("--output", type=Path, help="directory for results.json and items; also resumes after a kill")
    found.add_argument("--json", action="store_true", help="the harness's results object")
    found.add_argument("--replicas", type=int, default=1, help="data-parallel copies of the model (%(default)s)")
    found.add_argument("--run-code", action="store_true", help="run programs that the model writes, in a sandbox")
    found.add_argument("--contamination", action="store_true", help="whether the run has read the items, by its ledger")
    found.add_argument("--ngram", type=int, default=13, help="with it: tokens that an item must share (%(default)s)")
    found.add_argument("--workers", type=int, default=os.cpu_count(), help="with it: processes (%(default)s)")
    add_model_options(found)
    return found


def main(arguments: Sequence[str]) -> int:
    """Prints scores."""
    if arguments and arguments[0] == "fetch":
        from tools.evaluation.fetch import main as fetch

        return fetch(arguments[1:])
    options = parser().parse_intermixed_args(arguments)
    if _is_comparison(options):
        _refuse_others(options, allowed=("json", "source", "overrides"), where="a comparison")
        from tools.evaluation.compare import compare, table

        compared = compare(options.source, Path(options.overrides[0]))
        print(json.dumps(compared, indent=2) if options.json else table(compared))
        return 0
    _check(options)
    from megatron_qwen.core_patches.install import prepare_process

    prepare_process()
    if options.contamination:
        return _contamination(options)
    from megatron_qwen.config.world import smallest_world
    from megatron_qwen.distributed.rank import RankInfo, leave
    from tools.generation.loaded import open_for_inference

    info = RankInfo.from_environment()
    if info.world_size == 1:
        # Everything that is wrong with the source is said before ranks are started.
        _, config, _ = open_for_inference(options.source, load_options(options))
        if (ranks := smallest_world(config) * options.replicas) > 1:
            return start_ranks("tools.eval", options.source, arguments, ranks)
    set_up_log(rank=info.rank)
    found = _evaluate(options, info)
    if found is not None:
        _show(found, as_json=options.json)
    leave()
    return 0


def _evaluate(options: argparse.Namespace, info: "RankInfo") -> dict[str, Any] | None:
    from megatron_qwen.inference.together import Together
    from tools.evaluation.scoring import EvalOptions, evaluate
    from tools.generation.loaded import load

    wanted = EvalOptions(
        limit=options.limit, shots=options.shots, chat=options.chat, system=options.system, output=options.output
    )
    prepared: list[Prepared] = []
    model = load(options.source, load_options(options), info, first=lambda: prepared.append(_prepare(options)))
    together = Together(model.engine)
    if info.rank:
        together.follow()
        return None
    found = evaluate(model, together, prepared[0], wanted)
    together.close()
    return found


def _prepare(options: argparse.Namespace) -> "Prepared":
    from megatron_qwen.evaluation.tasks import CodeTasks, prepare

    # Nothing is run where nothing is answered.
    code: CodeTasks = "scored" if options.contamination else "run" if options.run_code else "refused"
    return prepare(_names(options), options.task_dir, shots=options.shots, code=code)


def _contamination(options: argparse.Namespace) -> int:
    from tools.evaluation.contaminated import check

    found = check(
        options.source,
        _prepare(options).by_name(),
        iteration=options.iteration,
        output=options.output,
        ngram=options.ngram,
        workers=options.workers,
    )
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for task, said in found.items():
        counts = f"{said['found']:,} of {said['items']:,} items ({said['found'] / max(1, said['items']):.1%})"
        print(f"{task}: {counts} share {said['ngram']} tokens or more with what the run has read,")
        print(
            f"    {said['found_mostly']:,} of them at least 0.6 of theirs; {said['too_short']:,} are too short to tell"
        )
        for metric, scores in said.get("scores", {}).items():
            parts = [f"{name} {'-' if value is None else format(value, '.4f')}" for name, value in scores.items()]
            print(f"    {metric.partition(',')[0]}: {', '.join(parts)}")
    return 0


def _show(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found["results"], indent=2))
        return
    for task, figures in found["results"].items():
        ranges = found["mq"]["intervals"].get(task, {})
        for name, value in figures.items():
            metric, _, kind = name.partition(",")
            if isinstance(value, float | int) and kind and not metric.endswith("_stderr"):
                low_high = "  [{:.4f}, {:.4f}]".format(*ranges[name]) if name in ranges else ""
                label = metric if kind == "none" else f"{metric} ({kind})"
                print(f"{task:32} {label:32} {value:10.4f}{low_high}")


def _names(options: argparse.Namespace) -> list[str]:
    return [name for name in (part.strip() for part in options.tasks.split(",")) if name]


def _is_comparison(options: argparse.Namespace) -> bool:
    return not options.tasks and len(options.overrides) == 1 and "=" not in options.overrides[0]


def _refuse_others(options: argparse.Namespace, *, allowed: Sequence[str], where: str) -> None:
    """Raises ConfigError with options that have been given and would not be looked at."""
    usual = vars(parser().parse_args([str(options.source)]))
    given = [name for name, value in vars(options).items() if name not in allowed and value != usual[name]]
    fix = f"has no effect on {where}; omit it."
    if given:
        raise ConfigError([Problem(f"--{name.replace('_', '-')}", getattr(options, name), fix) for name in given])


def _check(options: argparse.Namespace) -> None:
    search = ("ngram", "workers")
    common = ("source", "tasks", "task_dir", "output", "json", "iteration")
    if options.contamination:
        _refuse_others(options, allowed=(*common, *search, "contamination"), where="--contamination")
    else:
        everything = [name for name in vars(options) if name not in search]
        _refuse_others(options, allowed=everything, where="scores without --contamination")
    problems = []
    if not options.source.is_dir():
        problems.append(Problem("SOURCE", options.source, "is not there; name a run, a checkpoint or a directory."))
    if not _names(options):
        problems.append(Problem("--tasks", options.tasks, "must name at least one task."))
    bounds = (("--limit", options.limit, 1), ("--shots", options.shots, 0), ("--context", options.context, 2))
    for name, value, least in bounds:
        if value is not None and value < least:
            problems.append(Problem(name, value, f"must be at least {least}."))
    if options.replicas < 1:
        problems.append(Problem("--replicas", options.replicas, "must be at least 1."))
    if options.ngram < 5:
        problems.append(Problem("--ngram", options.ngram, "must be at least 5: any text has shorter runs."))
    if options.workers < 1:
        problems.append(Problem("--workers", options.workers, "must be at least 1."))
    if options.system is not None and not options.chat:
        problems.append(Problem("--system", options.system, "needs --chat."))
    if options.output is not None and options.output.exists() and not options.output.is_dir():
        problems.append(Problem("--output", options.output, "is not a directory."))
    if problems:
        raise ConfigError(problems)


if __name__ == "__main__":
    run_program(main)
