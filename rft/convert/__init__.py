"""Weights of other code in, weights for other code out."""
