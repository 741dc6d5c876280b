"""Where numbers go: metrics.jsonl, TensorBoard, Weights & Biases."""
