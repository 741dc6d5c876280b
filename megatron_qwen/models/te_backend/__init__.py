"""The modules of backend ``te``: NVIDIA's Transformer Engine, GPUs only."""
