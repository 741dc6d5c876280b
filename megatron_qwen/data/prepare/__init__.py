"""Text to token files: cut into units, encoded by many processes, joined in order; resumable at any moment."""
