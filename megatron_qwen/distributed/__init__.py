"""Ranks: how a process joins, which groups it is in, and what they agree on."""
