"""Pack ImageNet's out-of-distribution benchmarks into tar shards: see --help."""

from rft import cli
from rft.packing.commands.ood import main

if __name__ == "__main__":
    cli.run(main)
