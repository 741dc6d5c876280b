"""Removes text that should not be trained on: too short, of low quality, duplicated, or part of a test set."""
