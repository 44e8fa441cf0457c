"""The paper's mathematics: pure functions of tensors, options and addressed random numbers."""
