"""The training loop: what a step is, what surrounds it, and the features that hang on it as callbacks."""
