"""Records what llama-quantize makes of the models of models.py, as llama_quantize.json.

xllamacpp's library lacks ``llama_model_quantize``. It has what that needs, so src/llama-quant.cpp and
src/llama-model-loader.cpp of llama.cpp (MIT) can be compiled and linked with it:

    g++ -std=c++17 -O1 -fPIC -shared -D_GLIBCXX_USE_CXX11_ABI=0 -I src -I include -I ggml/include -I ggml/src
        src/llama-quant.cpp src/llama-model-loader.cpp -o libquant.so -L DIR -l:xllamacpp.abi3.so -Wl,-rpath,DIR
        -Wl,--allow-shlib-undefined

    python -m tests.checkpoints_convert.formats.gguf.record_llama_quantize libquant.so [MODEL ...]

Recorded with xllamacpp 2026.10.11549 and the sources inside llama_cpp_python 0.3.36, which are a little older: their
llama_hparams lacks one number behind n_layer_nextn and two behind n_rel_attn_bkts, which have to be put there so that
both have n_expert at the same place. (Print the first 30 numbers of the structure after load_hparams to see it.)
"""

import ctypes
import json
import sys
import tempfile
from pathlib import Path

import torch
import xllamacpp

from checkpoints_convert.compare.sides import open_side
from checkpoints_convert.formats.gguf.types import KINDS, Kind
from checkpoints_convert.formats.gguf.writing import GgufOptions, write_gguf
from tests.checkpoints_convert.formats.gguf.models import MODELS, importances, make
from tests.checkpoints_convert.formats.gguf.recorded import RECORD, summary


class _Importances(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class _Parameters(ctypes.Structure):  # llama_model_quantize_params of llama.h
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("nthread", "ftype", "output_tensor_type", "token_embedding_type")),
        *((name, ctypes.c_bool) for name in ("allow_requantize", "quantize_output_tensor", "only_copy", "pure")),
        *((name, ctypes.c_bool) for name in ("keep_split", "dry_run")),
        *((name, ctypes.c_void_p) for name in ("imatrix", "kv_overrides", "tt_overrides", "prune_layers")),
    ]


def record(library: Path, names: list[str]) -> None:
    ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))), mode=ctypes.RTLD_GLOBAL)
    quantizer = ctypes.CDLL(str(library))
    quantizer.llama_model_quantize_default_params.restype = _Parameters
    found = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    for name in names or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            side = open_side(make(name, directory / "hf"))
            write_gguf(side, directory / "out", ["F32"], GgufOptions(name="m", quiet=True))
            for kind in KINDS.values():
                if kind.name != "F32":
                    found[f"{name} {kind.name}"] = _made(quantizer, directory, kind, {})
                if kind.name.startswith("Q"):
                    found[f"{name} {kind.name} importances"] = _made(quantizer, directory, kind, importances(name))
    RECORD.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def _made(quantizer: ctypes.CDLL, directory: Path, kind: Kind, weights: dict[str, torch.Tensor]) -> dict[str, object]:
    parameters = quantizer.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = kind.file_type, 2
    entries = [_Importances(name.encode(), values.data_ptr(), values.numel()) for name, values in weights.items()]
    array = (_Importances * (len(entries) + 1))(*entries, _Importances(None, None, 0))
    if weights:
        parameters.imatrix = ctypes.addressof(array)
    source, target = directory / "out" / "m-F32.gguf", directory / "made.gguf"
    assert not quantizer.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    return summary(target)


if __name__ == "__main__":
    record(Path(sys.argv[1]), sys.argv[2:])
