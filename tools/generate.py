"""``mq generate``: text from a run, a checkpoint of any layout, or a Hugging Face directory."""

import argparse
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_qwen.cli import Parser, run_program
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.inference.request import Sampling
from tools.generation.options import add_model_options, load_options
from tools.generation.ranks import set_up_log, start_ranks
from tools.generation.stated_sampling import stated_sampling

if TYPE_CHECKING:
    from megatron_qwen.distributed.rank import RankInfo
    from tools.generation.chat import Rendering
    from tools.generation.loaded import LoadedModel

# Where nobody says otherwise: neither an option nor, with --chat, the files of the model.
_ASSUMED: dict[str, Any] = {"temperature": 0.8, "top_k": 0, "top_p": 0.95, "repetition_penalty": 1.0}


def parser() -> Parser:
    """The command line."""
    found = Parser(
        "mq generate",
        description="Generates text with the modules that train, on the ranks of any layout: SOURCE is a run, a "
        "checkpoint root, one iteration, or a Hugging Face directory. The same seed gives the same text under every "
        "layout and beside whatever other prompts.",
        examples=[
            'mq generate runs/first --prompt "def main("',
            'mq generate out/first-hf --prompt "import " --temperature 0 --json --logprobs',
            'mq generate runs/first parallel.tensor_model_parallel_size=2 --prompt "class "',
            "mq generate runs/first --prompts questions.jsonl --output answers.jsonl --temperature 0",
            'mq generate out/first-hf --chat --system "You are a helpful assistant."',
            'mq generate out/first-hf --prompt "import " --with transformers',
        ],
    )
    found.add_argument("source", type=Path, help="run, checkpoint root, one iteration, or Hugging Face directory")
    found.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="parallel.* for the layout; others with --config, for a checkpoint that another program wrote",
    )
    found.add_argument("--prompt", action="append", default=[], help="may be given more than once")
    found.add_argument("--prompts", type=Path, metavar="FILE", help='JSON lines with "prompt"; needs --output')
    found.add_argument("--output", type=Path, metavar="FILE", help="JSON lines of answers; resumes after a kill")
    found.add_argument("--chat", action="store_true", help="prompts are turns of a chat; without any, a conversation")
    found.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    found.add_argument("--max-new-tokens", type=int, default=100, help="at most (%(default)s)")
    found.add_argument("--temperature", type=float, help=f"0 takes the most likely token ({_stated('temperature')})")
    found.add_argument("--top-k", type=int, help=f"among so many tokens; 0: all ({_stated('top_k')})")
    found.add_argument("--top-p", type=float, help=f"among tokens of this probability ({_stated('top_p')})")
    found.add_argument("--repetition-penalty", type=float, help=f"1 is none ({_stated('repetition_penalty')})")
    found.add_argument("--presence-penalty", type=float, default=0.0, help="0 is none (%(default)s)")
    found.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be repeated")
    found.add_argument("--samples", type=int, default=1, help="answers to each prompt (%(default)s)")
    found.add_argument("--seed", type=int, default=0, help="of the sampling (%(default)s)")
    found.add_argument("--logprobs", action="store_true", help="with --json: of each token, in nats")
    found.add_argument("--json", action="store_true", help="a list of {prompt, text, tokens, logprobs, ...}")
    found.add_argument("--replicas", type=int, default=1, help="with --prompts: copies of the model (%(default)s)")
    add_model_options(found)
    found.add_argument(
        "--with", dest="by", choices=["engine", "transformers"], default="engine", help="what computes (%(default)s)"
    )
    return found


def main(arguments: Sequence[str]) -> int:
    """Prints the answers, in the order of the prompts."""
    options = parser().parse_intermixed_args(arguments)
    stated = stated_sampling(options.source) if options.chat else {}
    sampling = _sampling(options, stated)
    if options.by == "transformers":
        from tools.generation import with_transformers

        texts = with_transformers.generate(options.source, options.prompt, sampling)
        pairs = zip(options.prompt, texts, strict=True)
        _show([{"prompt": prompt, "text": text} for prompt, text in pairs], as_json=options.json)
        return 0
    from megatron_qwen.core_patches.install import prepare_process

    prepare_process()
    from megatron_qwen.distributed.rank import RankInfo, leave

    info = RankInfo.from_environment()
    if info.world_size == 1 and (ranks := _ranks(options)) > 1:
        talks = options.prompts is None and not options.prompt
        return start_ranks("tools.generate", options.source, arguments, ranks, talks=talks)
    set_up_log(rank=info.rank)
    if info.rank == 0 and (used := {name: value for name, value in stated.items() if getattr(options, name) is None}):
        told = ", ".join(f"{name} {value}" for name, value in used.items())
        print(f"sampled as the model's files say: {told}", file=sys.stderr)
    if options.prompts is not None:
        _answer_file(options, sampling, info)
        leave()
        return 0
    if not options.prompt:
        _talk(options, sampling, info)
        leave()
        return 0
    found = _answers(options, sampling, info)
    if info.rank == 0:
        _show(found, as_json=options.json)
    leave()
    return 0


def _answer_file(options: argparse.Namespace, sampling: Sampling, info: "RankInfo") -> None:
    from megatron_qwen.inference.together import Together
    from tools.generation.files import PromptFile, answer_file
    from tools.generation.loaded import load

    prompts = None if info.rank else PromptFile.of(options.prompts)
    model = load(options.source, load_options(options), info)
    together = Together(model.engine)
    if prompts is None:
        together.follow()
        return
    answer_file(model, together, prompts, sampling, options.output, _rendering(options, model))
    together.close()


def _answers(options: argparse.Namespace, sampling: Sampling, info: "RankInfo") -> list[dict[str, Any]]:
    from tools.generation.loaded import load
    from tools.generation.texts import complete

    model = load(options.source, load_options(options), info)
    render = _rendering(options, model)
    done = sorted(complete(model, options.prompt, sampling, render), key=lambda one: one.number)
    return [one.as_json(logprobs=options.logprobs) for one in done]


def _talk(options: argparse.Namespace, sampling: Sampling, info: "RankInfo") -> None:
    from megatron_qwen.inference.service import Service
    from tools.generation.chat import chat_template
    from tools.generation.loaded import load
    from tools.generation.session import ChatSession, talk

    model = load(options.source, load_options(options), info)
    service = Service(model.engine)
    if info.rank:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal all ranks get it; rank 0 decides
        service.loop()
        return
    template = chat_template(model.source.tokenizer)
    talk(ChatSession(model, service, template, sampling, options.system, sys.stdin, sys.stdout))


def _rendering(options: argparse.Namespace, model: "LoadedModel") -> "Rendering | None":
    """How a prompt becomes the text that the model gets; None leaves it as it is."""
    if not options.chat:
        return None
    from tools.generation.chat import chat_template

    return chat_template(model.source.tokenizer).of_a_question(options.system)


def _ranks(options: argparse.Namespace) -> int:
    """Local ranks to start; everything that is wrong with the source is said before they are."""
    from megatron_qwen.config.world import smallest_world
    from tools.generation.loaded import open_for_inference

    _, config, _ = open_for_inference(options.source, load_options(options))
    return smallest_world(config) * int(options.replicas)


def _show(found: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for one in found:
        print(f"{one['prompt']}{one['text']}\n")


def _stated(name: str) -> str:
    return f"{_ASSUMED[name]}, or with --chat as the model's files say"


def _sampling(options: argparse.Namespace, stated: Mapping[str, Any]) -> Sampling:
    asked = {name: getattr(options, name) for name in _ASSUMED if getattr(options, name) is not None}
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        **{**_ASSUMED, **stated, **asked},
        presence_penalty=options.presence_penalty,
        stop_strings=tuple(options.stop),
        seed=options.seed,
        samples=options.samples,
    )
    problems = sampling.problems()
    if not options.source.is_dir():
        problems.append(Problem("SOURCE", options.source, "is not there; name a run, a checkpoint or a directory."))
    problems += _of_files(options)
    if not all(options.prompt):
        problems.append(Problem("--prompt", "''", "must hold text."))
    if not all(options.stop):
        problems.append(Problem("--stop", "''", "must hold text."))
    if options.context is not None and options.context < 2:
        problems.append(Problem("--context", options.context, "must be at least 2."))
    if options.logprobs and not options.json:
        problems.append(Problem("--logprobs", None, "needs --json, which shows them."))
    if options.by == "transformers":
        problems += _for_the_engine(options)
    if problems:
        raise ConfigError(problems)
    return sampling


def _of_files(options: argparse.Namespace) -> list[Problem]:
    """What is wrong with where prompts come from and answers go."""
    problems = []
    talks = options.chat and options.prompts is None
    if bool(options.prompt) == (options.prompts is not None) and not (talks and not options.prompt):
        problems.append(Problem("--prompt", None, "give texts with --prompt, or a file with --prompts."))
    if (options.prompts is None) != (options.output is None):
        problems.append(Problem("--output", options.output, "goes with --prompts FILE; give both or neither."))
    if options.prompts is not None and not options.prompts.is_file():
        problems.append(Problem("--prompts", options.prompts, "is no file."))
    if options.output is not None and options.output.is_dir():
        problems.append(Problem("--output", options.output, "is a directory; name a file."))
    if options.system is not None and not options.chat:
        problems.append(Problem("--system", options.system, "needs --chat."))
    if talks and not options.prompt and (options.json or options.samples > 1):
        problems.append(Problem("--chat", None, "a conversation has one answer a turn, as text; give --prompt."))
    if options.replicas < 1 or (options.replicas > 1 and options.prompts is None):
        problems.append(Problem("--replicas", options.replicas, "must be at least 1, and more only with --prompts."))
    if options.prompts is not None and (options.json or options.logprobs):
        problems.append(Problem("--json", None, "the file of answers has all that it shows; omit it."))
    return problems


def _for_the_engine(options: argparse.Namespace) -> list[Problem]:
    """Options that transformers is not given: with them it would compute something else than was asked for."""
    given = {
        "overrides": " ".join(options.overrides) or None,
        "--iteration": options.iteration,
        "--config": options.config,
        "--tokenizer": options.tokenizer,
        "--dtype": options.dtype,
        "--context": options.context,
        "--logprobs": options.logprobs or None,
        "--prompts": options.prompts,
        "--chat": options.chat or None,
    }
    fix = "has no effect with --with transformers; omit one of the two."
    return [Problem(name, value, fix) for name, value in given.items() if value is not None]


if __name__ == "__main__":
    run_program(main)
