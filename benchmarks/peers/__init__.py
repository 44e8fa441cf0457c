"""The thirteen questions of docs/peers.md, tested on libraries for the same work.

Each peer runs in the environment that it requires, on a few hundred small photographs, in the way
that its documentation shows. The tests count what the peer does and ignore what it reports.
`python -m benchmarks.peers` runs them all, and rft's own tests of the same questions.
"""
