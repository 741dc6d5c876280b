"""Converters between checkpoints and Hugging Face directories, on one mapping table, and comparisons of both."""
