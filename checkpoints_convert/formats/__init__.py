"""Formats of quantized weights: how a linear layer's codes, scales and zeros are packed, and what config.json says."""
