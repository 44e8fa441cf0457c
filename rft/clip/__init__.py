"""CLIP as used by rft: loading by name, the image tower, and classification with its text."""
