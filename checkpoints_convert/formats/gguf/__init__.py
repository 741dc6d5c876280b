"""GGUF, the file format of llama.cpp: weights in blocks with scales, configuration and tokenizer in one file."""
