"""Scores of a model: lm-evaluation-harness on the engine, and what the test data has in common with the training's."""

import os

# Before the harness is imported, whose bars do not know how much there is to do. (A rank sets it in ``train.py``.)
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
