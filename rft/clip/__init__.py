"""CLIP as rft uses it: load it by name, run its image tower, classify with its text."""
