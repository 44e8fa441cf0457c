"""Exact evaluation: integer counts over every sample, once."""
