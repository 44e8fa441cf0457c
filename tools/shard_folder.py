"""Pack your own images, one folder per class, into tar shards: see --help."""

from rft import cli
from rft.packing.commands.folder import main

if __name__ == "__main__":
    cli.run(main)
