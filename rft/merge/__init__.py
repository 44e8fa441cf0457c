"""Weight-space merging: checkpoints in, checkpoint out."""
