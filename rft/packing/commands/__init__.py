"""The commands that create and verify packed sets: tools/*.py, `rft pack`, `index`, `verify`."""
