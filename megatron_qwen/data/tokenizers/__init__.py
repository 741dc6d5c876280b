"""Tokenizer directories: loading, training, and fast encoding."""
