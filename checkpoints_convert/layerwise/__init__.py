"""A model run one layer at a time, so that any size fits: what comparisons of logits and calibration share."""
