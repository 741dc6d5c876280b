"""llama.cpp, as xllamacpp has it, for tests: logits and tokens through its C functions, text through its server."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
import xllamacpp

# Structures of parameters are larger than 16 bytes and smaller than this: the caller passes them in memory, so one that
# is too long holds them.
_ROOM = 1024


class _Parameters(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * _ROOM)]


class _Batch(ctypes.Structure):  # llama_batch of llama.h
    _fields_ = [("n_tokens", ctypes.c_int32), *((f"pointer_{number}", ctypes.c_void_p) for number in range(6))]


@cache
def library() -> Any:
    found = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
    for name, answer, arguments in (
        ("llama_model_default_params", _Parameters, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Parameters]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_model_free", None, [pointer]),
        ("llama_tokenize", number, [pointer, ctypes.c_char_p, number, pointer, number, flag, flag]),
        ("llama_context_default_params", _Parameters, []),
        ("llama_init_from_model", pointer, [pointer, _Parameters]),
        ("llama_free", None, [pointer]),
        ("llama_set_n_threads", None, [pointer, number, number]),
        ("llama_batch_get_one", _Batch, [pointer, number]),
        ("llama_decode", number, [pointer, _Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, number]),
    ):
        function = getattr(found, name)
        function.restype, function.argtypes = answer, arguments
    found.llama_backend_init()
    return found


class LlamaModel:
    """A file that llama.cpp has loaded."""

    def __init__(self, path: Path) -> None:
        self._model = library().llama_model_load_from_file(str(path).encode(), library().llama_model_default_params())
        assert self._model, f"llama.cpp does not load {path}"
        self._vocabulary = library().llama_model_get_vocab(self._model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        library().llama_model_free(self._model)

    def encode(self, text: str, *, control: bool = True) -> list[int]:
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 8))()
        # With the tokens that it adds to a text by itself: a file says that there are none.
        count = library().llama_tokenize(self._vocabulary, data, len(data), room, len(room), True, control)
        assert count >= 0
        return list(room[:count])

    def logits(self, ids: list[int], *, vocab_size: int) -> torch.Tensor:
        """Of the token that follows, [vocab_size]."""
        context = library().llama_init_from_model(self._model, library().llama_context_default_params())
        library().llama_set_n_threads(context, 1, 1)  # more of them wait for one another while other tests run
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        assert library().llama_decode(context, library().llama_batch_get_one(tokens, len(ids))) == 0
        found = torch.tensor(library().llama_get_logits_ith(context, -1)[:vocab_size])
        library().llama_free(context)
        return found


def generated(path: Path, prompt: str, *, tokens: int) -> str:
    """What xllamacpp's server makes of a prompt, greedily."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = 256
    parameters.warmup = False
    parameters.cpuparams.n_threads = 1
    asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
    answer: dict[str, Any] = xllamacpp.Server(parameters).handle_completions(asked)
    assert answer["usage"]["completion_tokens"] == tokens
    return str(answer["choices"][0]["text"])
