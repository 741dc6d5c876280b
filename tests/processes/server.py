"""The warm interpreter: has imported what programs use, and forks a child for each command line.

It does not import megatron-core, which binds names that ``prepare_process`` replaces first, nor what needs it: every
child imports those anew. A child whose PYTHONPATH names another copy of the project imports all of the project anew.
"""

import contextlib
import gc
import importlib
import logging
import os
import pickle
import pkgutil
import socket
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from tests.processes.nested import fork_in_place
from tests.processes.protocol import SERVER_VARIABLE, become, has_threads, is_worker

# What ranks and programs import before they do anything: most of the nine CPU seconds of a rank's start.
LIBRARIES = (
    "numpy",
    "yaml",
    "psutil",
    "orjson",
    "xxhash",
    "scipy.special",
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed._tensor",
    "torch.distributed.tensor.experimental",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
    "multistorageclient",
    "safetensors.torch",
    "tokenizers",
    "sentencepiece",
    "transformers",
    "transformers.models.qwen2.modeling_qwen2",
)
# Packages of the project that import no megatron-core, without what is named below.
_PROJECT = (
    "launch",
    "tools",
    "checkpoints_convert",
    *(f"megatron_qwen.{name}" for name in ("config", "data", "estimate", "hf", "job", "recipes", "resilience")),
)
_NOT_OF_IT = (
    "tools.dev",
    "tools.generation",
    "tools.evaluation",
    "tools.serving",
    "checkpoints_convert.layerwise.layered_core",
    "checkpoints_convert.compare.whole_models",
    "megatron_qwen.data.text.parquet",  # pyarrow starts threads
)


def project_modules() -> list[str]:
    """Modules of the project that are imported in advance."""
    found = []
    for name in _PROJECT:
        package = importlib.import_module(name)
        inner = pkgutil.walk_packages(package.__path__, f"{name}.")
        found += [name, *(module.name for module in inner if not module.name.startswith(_NOT_OF_IT))]
    return found


def import_libraries(names: Sequence[str] = LIBRARIES) -> None:
    """Imports them, so that forked children share them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable()  # notices that there is no CUDA
        for name in names:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        logging.disable(logging.NOTSET)
    assert "megatron" not in sys.modules, "megatron-core was imported before prepare_process"
    assert len(os.listdir("/proc/self/task")) == 1, "a library started a thread: forking is not safe"  # noqa: PTH208
    gc.collect()
    gc.freeze()  # the collector leaves shared pages shared


def serve(connection: socket.socket) -> NoReturn:
    """Serves requests of the process at the other end of a socket until it closes it."""
    while True:
        data, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not data:
            os._exit(0)  # finalizers of libraries would report what they leak
        command, options = pickle.loads(data)
        child = _fork_orphan()
        for stream in streams if child else ():
            os.close(stream)
        if child:
            connection.sendall(child.to_bytes(4, "little"))
        elif is_worker(command[1:]):
            become(command, options, streams, prepare=_leave_a_server)
        elif has_threads(command[1:]):
            become(command, options, streams, prepare=_fork_from_a_server)
        else:
            become(command, options, streams, prepare=fork_in_place)


def _leave_a_server() -> None:
    """Forks a server for this process, a worker that will have threads and patched libraries before it needs one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        os.environ[SERVER_VARIABLE] = str(ours.detach())
        return
    ours.close()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):  # pytest-xdist's connection to its worker
        os.dup2(nothing, stream)
    serve(theirs)


def _fork_from_a_server() -> None:
    """Has this process, a program that will have threads, fork what it starts from a server of its own."""
    _leave_a_server()
    from tests.processes.client import ForkServer

    ForkServer().install()


def _fork_orphan() -> int:
    """Forks a process that is not this one's child but falls to whoever asked; 0 in that process.

    The one in between ends at once, and the process that asked has made itself the reaper of orphans for this moment.
    """
    go_read, go_write = os.pipe()
    number_read, number_write = os.pipe()
    if middle := os.fork():
        os.close(go_read)
        os.close(number_write)
        os.waitpid(middle, 0)
        number = os.read(number_read, 4)
        if len(number) < 4:
            raise OSError("the process in between could not fork")
        child = int.from_bytes(number, "little")
        os.close(number_read)
        os.close(go_write)
        return child
    if child := os.fork():
        os.write(number_write, child.to_bytes(4, "little"))
        os._exit(0)
    os.close(go_write)
    os.read(go_read, 1)  # until the new parent is in its place
    return 0


if __name__ == "__main__":
    import_libraries([*LIBRARIES, *project_modules()])
    serve(socket.socket(fileno=int(sys.argv[1])))
