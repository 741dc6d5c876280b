"""Directories of quantized weights read back: what their codes, scales and zeros stand for, without trust."""
