"""From packed sets to batches: the samples of each step, and their images in memory."""
