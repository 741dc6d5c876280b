"""Programs that start ranks: locally, and for the demo."""
