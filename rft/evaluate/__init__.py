"""Exact evaluation: integer counts, with every sample counted exactly once."""
