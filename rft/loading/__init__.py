"""From packed sets to batches: which samples a step reads, and their images in memory."""
