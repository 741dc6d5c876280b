"""Converters between checkpoints and Hugging Face directories, on the library's one mapping table."""
