"""From a configuration to megatron-core model chunks, and from their tensors to Hugging Face names."""
