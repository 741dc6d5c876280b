"""Statistics of token files: document lengths and unigram entropy."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_qwen.data.reading.samples import SampleSource
from megatron_qwen.data.token_files.token_set import TokenSet

_DOCUMENTS = 1 << 20
_LONGEST = 10


@dataclass(frozen=True)
class LengthStatistics:
    """How long documents are.

    Args:
        edges: bounds of the classes, in tokens; each is twice the one before.
        documents: documents of each class.
        tokens: tokens of each class.
        median: of the documents, to the width of a class.
        longest: length and number of the longest documents, the longest first.
    """

    edges: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    median: int
    longest: list[tuple[int, int]]


def lengths(source: TokenSet) -> LengthStatistics:
    """Statistics of the document lengths; reads the whole index, in pieces."""
    edges = np.concatenate(([0], 2 ** np.arange(32, dtype=np.int64)))
    documents = np.zeros(len(edges) - 1, dtype=np.int64)
    tokens = np.zeros_like(documents)
    longest: list[tuple[int, int]] = []
    for first in range(0, source.num_documents, _DOCUMENTS):
        some = source.lengths(first, min(first + _DOCUMENTS, source.num_documents)).astype(np.int64)
        classes = np.searchsorted(edges, some, side="right") - 1
        documents += np.bincount(classes, minlength=len(documents))
        tokens += np.bincount(classes, weights=some, minlength=len(documents)).astype(np.int64)
        most = np.argsort(some)[-_LONGEST:]
        longest = sorted([*longest, *((int(some[at]), first + int(at)) for at in most)], reverse=True)[:_LONGEST]
    middle = int(np.searchsorted(np.cumsum(documents), source.num_documents / 2))
    last = int(np.flatnonzero(documents)[-1]) + 1
    return LengthStatistics(edges[: last + 1], documents[:last], tokens[:last], int(edges[middle]), longest)


def unigram_entropy(source: SampleSource, samples: int) -> float:
    """Unigram entropy, in nats per token, of the labels of the first samples.

    It is the loss of a model that knows only how often each token occurs: a trained model must be below it.

    Args:
        source: the samples.
        samples: how many.
    """
    labels = np.concatenate([source[index].labels for index in range(samples)])
    counts = np.unique(labels, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())
