"""Scores of a model: lm-evaluation-harness on the engine, and what the test data has in common with the training's."""
