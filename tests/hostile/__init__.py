"""Hostile or broken input for each command: a table of rows, and fuzzers.

`python -m tests.hostile` prints the number of rows of each kind; tests/hostile/test_table.py runs
them. `python -m tests.hostile.fuzz` (make fuzz) runs the fuzzers.
"""
