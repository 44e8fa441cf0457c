"""Statistics of per-image predictions, with their uncertainty. Pure: NumPy and SciPy."""
