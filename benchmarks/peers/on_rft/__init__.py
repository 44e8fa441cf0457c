"""rft's own packer, loader and checkpoints: python -m benchmarks.peers.on_rft --work FOLDER.

A package, as rft's commands are: loader processes import the module that was started, and
`__main__` of a package imports nothing.
"""
