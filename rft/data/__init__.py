"""Packing image sets into tar shards, and reading them back."""
