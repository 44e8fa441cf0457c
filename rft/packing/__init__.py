"""Packs folders and archives of images into sets of shards, and verifies such sets; no torch."""
