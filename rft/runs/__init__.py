"""The run folder: what its files are called, what each may hold, and what belongs together."""
