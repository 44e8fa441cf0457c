"""The paper's mathematics: pure functions on tensors, of options and addressed random numbers."""
