"""Make shards that exist already readable for rft, without copying them: see --help."""

from rft import cli
from rft.packing.commands.index import main

if __name__ == "__main__":
    cli.run(main)
