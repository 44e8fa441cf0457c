"""Pack any other test set, with or without domains, into tar shards: see --help."""

from rft import cli
from rft.packing.commands.other_set import main

if __name__ == "__main__":
    cli.run(main)
