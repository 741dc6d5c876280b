"""``mq serve``: a model behind HTTP, in the words of OpenAI's interface."""

import argparse
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from megatron_qwen.cli import Parser, run_program
from megatron_qwen.errors import ConfigError, Problem, UserError
from tools.generation.options import add_model_options, load_options
from tools.generation.ranks import set_up_log, start_ranks
from tools.generation.stated_sampling import stated_sampling

if TYPE_CHECKING:
    from megatron_qwen.distributed.rank import RankInfo
    from tools.generation.chat import ChatTemplate
    from tools.generation.loaded import LoadedModel

_KEY = "MQ_SERVE_KEY"
_LOCAL = ("127.0.0.1", "localhost", "::1")


def parser() -> Parser:
    """The command line."""
    found = Parser(
        "mq serve",
        description="Serves a model over HTTP in the words of OpenAI's interface (completions, chat completions with "
        "streaming and tools, models, health, metrics), with the modules that train, on the ranks of any layout. For "
        "trying checkpoints, not for production: serve an export with vLLM or SGLang. Clients must send the key in "
        f"the environment variable {_KEY}, if there is one.",
        examples=[
            "mq serve runs/first",
            "mq serve out/first-hf --port 8001 --name first",
            "mq serve runs/first parallel.tensor_model_parallel_size=2 --max-pending 64",
        ],
    )
    found.add_argument("source", type=Path, help="run, checkpoint root, one iteration, or Hugging Face directory")
    found.add_argument("overrides", nargs="*", metavar="section.field=value", help="parallel.* for the layout")
    found.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s: this machine alone)")
    found.add_argument("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    found.add_argument("--name", help="of the model; default: that of the run or directory")
    found.add_argument("--max-pending", type=int, default=256, help="requests that wait or run (%(default)s)")
    found.add_argument("--max-sequences", type=int, default=64, help="answered at a time (%(default)s)")
    found.add_argument("--timeout", type=float, default=600.0, help="seconds for a request (%(default)s)")
    add_model_options(found)
    return found


def main(arguments: Sequence[str]) -> int:
    """Serves until SIGTERM or Ctrl-C, and ends when what was asked has been answered."""
    options = parser().parse_intermixed_args(arguments)
    _check(options)
    from megatron_qwen.core_patches.install import prepare_process

    prepare_process()
    from megatron_qwen.config.world import smallest_world
    from megatron_qwen.distributed.rank import RankInfo, leave
    from tools.generation.loaded import load, open_for_inference

    info = RankInfo.from_environment()
    if info.world_size == 1:
        # Everything that is wrong with the source is said before ranks are started.
        _, config, _ = open_for_inference(options.source, load_options(options, sequences=options.max_sequences))
        if (ranks := smallest_world(config)) > 1:
            return start_ranks("tools.serve", options.source, arguments, ranks)
    set_up_log(rank=info.rank)
    # Somebody may be reading an answer: it goes on beside other prompts.
    wanted = load_options(options, sequences=options.max_sequences, prompts_first=False)
    model = load(options.source, wanted, info)
    _serve(model, options, info)
    leave()
    return 0


def _serve(model: "LoadedModel", options: argparse.Namespace, info: "RankInfo") -> None:
    from megatron_qwen.inference.service import Service

    service = Service(model.engine)
    if info.rank:
        # Rank 0 is told to stop, and tells the others; the launcher passes the signal to all.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        service.loop()
        return

    def stop(number: int, frame: FrameType | None) -> None:
        service.stop()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, stop)
    from tools.serving.app import Server, build_app
    from tools.serving.running import HttpServer

    server = Server(
        service,
        model.tokenizer,
        _chat(model),
        model.ends,
        model.chat_ends,
        options.name or model.source.name,
        key=os.environ.get(_KEY) or None,
        most_pending=options.max_pending,
        timeout_s=options.timeout,
        chat_sampling=stated_sampling(options.source),
    )
    http = HttpServer(build_app(server), options.host, options.port, failed=service.stop)
    try:
        if http.start():
            print(f"serving {server.name} at http://{options.host}:{http.port}/v1", flush=True)
            service.loop()
        else:
            service.stop()
            service.loop()  # the other ranks end with this one
    finally:
        http.stop()
    if http.error is not None:
        raise ConfigError(Problem("--port", f"{options.host}:{options.port}", f"cannot be served ({http.error})."))


def _chat(model: "LoadedModel") -> "ChatTemplate | None":
    from tools.generation.chat import chat_template

    try:
        return chat_template(model.source.tokenizer)
    except UserError:
        return None  # completions only; a chat gets an error that says so


def _check(options: argparse.Namespace) -> None:
    problems = []
    if not options.source.is_dir():
        problems.append(Problem("SOURCE", options.source, "is not there; name a run, a checkpoint or a directory."))
    if not 0 <= options.port < 65536:
        problems.append(Problem("--port", options.port, "must be from 0 to 65535."))
    bounds = (("--max-pending", options.max_pending), ("--max-sequences", options.max_sequences))
    problems += [Problem(name, value, "must be at least 1.") for name, value in bounds if value < 1]
    if not options.timeout > 0:
        problems.append(Problem("--timeout", options.timeout, "must be above 0."))
    if options.context is not None and options.context < 2:
        problems.append(Problem("--context", options.context, "must be at least 2."))
    if options.host not in _LOCAL and not os.environ.get(_KEY):
        fix = f"is open to other machines: set {_KEY} to a key that clients must send."
        problems.append(Problem("--host", options.host, fix))
    if problems:
        raise ConfigError(problems)


if __name__ == "__main__":
    run_program(main)
