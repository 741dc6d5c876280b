"""``mq eval``: a model's scores in tasks of lm-evaluation-harness, and comparisons of them."""
