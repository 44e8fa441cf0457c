"""Fuzzers: valid input is mutated, and whatever comes of it, only a clear refusal may.

A target is a strategy and a check; `guard` watches the check, `engine` counts. A short run of each
is a test (tests/hostile/test_fuzz.py), `make fuzz` is the long one.
"""
