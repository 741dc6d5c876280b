"""From a configuration to megatron-core model chunks on either backend, and to Hugging Face names and back."""
