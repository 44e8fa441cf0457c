"""The format of a packed set, which packing writes and loading reads; no torch."""
