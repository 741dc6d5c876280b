"""What a run reads: sources, samples and the ledger of what has been read."""
