"""Tokenizer directories: loaded, trained, and encoding text at speed."""
