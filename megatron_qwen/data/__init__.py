"""From text to samples: tokenizers, token files, sample order, batches. Imports no torch but in batches.py."""
