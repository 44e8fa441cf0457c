"""The commands that make packed sets: tools/*.py, and `rft pack`, `rft index`, `rft verify`."""
