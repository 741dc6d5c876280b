"""``mq data``: tokenizers, cleaning, token files, what a run will read of them and what it has read."""
