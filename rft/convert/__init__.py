"""Import of weights from other code, and export of models for other code."""
