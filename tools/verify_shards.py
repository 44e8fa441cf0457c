"""Check packed or indexed sets against their manifests: see --help."""

from rft import cli
from rft.packing.commands.verify import main

if __name__ == "__main__":
    cli.run(main)
