"""The optimizer, its state (plain, precision-aware or offloaded to the host) and the learning-rate schedule."""
