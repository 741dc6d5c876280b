"""From text to batches: tokenizers, token files, sample order, loaders. Only batches and DALI need torch."""
