"""Vocabulary padding: embedding rows must be divisible by the tensor parallel size."""


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """Rows of the embedding under a layout: ``vocab_size`` up to a multiple of 128 x TP.

    One rank takes the same multiple of 128, so that kernels see aligned shapes.
    """
    multiple = 128 * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple
