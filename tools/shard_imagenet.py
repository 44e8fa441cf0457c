"""Pack ImageNet's training and validation images into tar shards: see --help."""

from rft import cli
from rft.packing.commands.imagenet import main

if __name__ == "__main__":
    cli.run(main)
