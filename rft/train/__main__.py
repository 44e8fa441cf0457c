"""`python -m rft.train`: see rft/train/command.py."""

import os

from rft import cli
from rft.train.command import main

if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cli.run(main, ranks=True)
