"""What per-image predictions say of a model, with the uncertainty of it. Pure: NumPy and SciPy."""
