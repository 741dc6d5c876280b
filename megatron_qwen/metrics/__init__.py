"""Where numbers go: metrics.jsonl, TensorBoard, Weights & Biases, the performance card, the terminal."""
