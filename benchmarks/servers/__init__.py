"""Real servers on loopback, and real faults, for benchmarks and tests."""
