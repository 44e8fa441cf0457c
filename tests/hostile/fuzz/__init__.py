"""Fuzzers: valid input is mutated, and must be accepted or clearly refused.

A target is a strategy and a check; `guard` monitors the check, `engine` counts. A short run of each
is a test (tests/hostile/test_fuzz.py), `make fuzz` is the long one.
"""
