"""Whether weights, optimizer state and gradients are what they should be."""
