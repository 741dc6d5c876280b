"""Benchmarks, each against a peer in the same run, reported as a ratio."""
