"""The peer: a loop as in Megatron-LM's preprocess_data.py, Hugging Face tokenizers in two processes."""

import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

_WORKERS, _CHUNK = 2, 32
_state: dict[str, Any] = {}


def _begin(tokenizer: str) -> None:
    from tokenizers import Tokenizer

    _state["tokenizer"] = Tokenizer.from_file(tokenizer)


def _encode(line: str) -> tuple[list[int], int]:
    ids = _state["tokenizer"].encode(json.loads(line)["text"], add_special_tokens=False).ids
    return [*ids, 151_643], len(line)


def main(corpus: str, tokenizer: str, prefix: str) -> None:
    """Prints the seconds that it took, imports left out."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    started = time.perf_counter()
    builder: Any = IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32)
    with (
        multiprocessing.get_context("spawn").Pool(_WORKERS, initializer=_begin, initargs=(tokenizer,)) as pool,
        Path(corpus).open(encoding="utf-8") as lines,
    ):
        for ids, _ in pool.imap(_encode, lines, _CHUNK):
            builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(prefix + ".idx")
    print(time.perf_counter() - started)


if __name__ == "__main__":
    main(*sys.argv[1:])
