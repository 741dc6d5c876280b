"""Comparing two models: bits, configuration, logits, change; and what is in one."""
