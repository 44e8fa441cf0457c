"""Weight-space merging: checkpoints in, one checkpoint out."""
