"""Low-rank adapters (LoRA) beside a model whose own weights are frozen."""
