"""The optimizer, its state whole, lean or on the host, and the learning-rate schedule."""
