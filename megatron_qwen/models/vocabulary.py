"""Vocabulary padding: the rows of the embedding must be divisible by the tensor-parallel size."""

# Megatron-LM's default of make-vocab-size-divisible-by: aligned shapes for GEMMs.
_MULTIPLE = 128


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """Rows of the embedding under a layout: ``vocab_size`` rounded up to a multiple of 128 x TP."""
    multiple = _MULTIPLE * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple
