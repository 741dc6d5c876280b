"""Patches of megatron-core and torch, one file each: what is replaced, why, since when, and when it can go."""
