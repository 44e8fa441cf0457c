"""rft's own packer, loader and checkpoints: python -m benchmarks.peers.on_rft --work FOLDER.

A package like rft's commands, because loader processes import the started module, and the
`__main__` of a package imports nothing.
"""
