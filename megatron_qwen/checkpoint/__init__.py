"""Checkpoints: written under a temporary name, committed with a manifest, verified before they are trusted."""
