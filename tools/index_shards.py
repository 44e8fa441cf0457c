"""Index existing shards in place, so that rft can read them: see --help."""

from rft import cli
from rft.packing.commands.index import main

if __name__ == "__main__":
    cli.run(main)
