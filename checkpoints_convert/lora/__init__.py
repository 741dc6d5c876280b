"""Adapters: PEFT's files out and in, and merged weights."""
