"""Pretrain the Qwen2.5 family on megatron-core: the library that every rank imports."""

__version__ = "0.1.0"
