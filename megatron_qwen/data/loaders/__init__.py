"""Batches of a rank, prefetched before the step that needs them."""
