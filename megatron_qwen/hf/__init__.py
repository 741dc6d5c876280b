"""Hugging Face's names for a model: config.json and the table of tensors. Imports no torch."""
