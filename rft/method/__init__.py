"""The paper's mathematics, pure functions on tensors; imports nothing of rft."""
