"""What megatron-core and torch must do differently here: one file a patch, applied by ``main`` and never at import."""
