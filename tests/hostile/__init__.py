"""What hostile or broken input may do to each command: a table of rows, and fuzzers.

`python -m tests.hostile` prints how many rows there are of each kind; tests/hostile/test_table.py
runs them. `python -m tests.hostile.fuzz` (make fuzz) runs the fuzzers.
"""
