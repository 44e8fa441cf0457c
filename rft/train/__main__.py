"""`python -m rft.train`: see rft/train/command.py."""

from rft import cli
from rft.train.command import main

if __name__ == "__main__":
    cli.run(main, ranks=True)
