"""Batches of a rank, read ahead of the step that needs them."""
