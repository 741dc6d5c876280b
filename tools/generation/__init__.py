"""What `mq generate` is made of: a model on the ranks of a layout, and texts for the engine's tokens."""
