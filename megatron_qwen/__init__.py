"""Pretrain the Qwen2.5 and Qwen3 families on megatron-core: the library that every rank imports."""

__version__ = "0.1.0"
