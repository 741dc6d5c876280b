"""What the tokens alone say, for comparison with a model."""

import numpy as np

from megatron_qwen.data.samples import WindowSource


def unigram_entropy(source: WindowSource, samples: int) -> float:
    """Entropy in nats of the labels of the first samples, each token taken by itself.

    A model that knows only how often each token occurs has this loss on them.

    Args:
        source: the samples.
        samples: how many.
    """
    labels = np.concatenate([source[index].labels for index in range(samples)])
    counts = np.unique(labels, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())
