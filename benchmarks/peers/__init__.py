"""The thirteen questions of docs/peers.md, put to the libraries that people use for the same work.

Each peer is run in the environment that it asks for, on a few hundred small photographs, by the way
that its documentation shows; what it did is counted, not what it says. `python -m benchmarks.peers`
runs them all and rft's own tests of the same questions.
"""
