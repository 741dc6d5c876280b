"""``mq data``: tokenizers, token files, blends, and what a run has read of them."""
