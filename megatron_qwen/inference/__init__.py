"""Text from the modules that train: a paged KV cache, continuous batching, sampling that no layout changes."""
