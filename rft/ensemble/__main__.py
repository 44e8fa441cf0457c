"""`python -m rft.ensemble`: see rft/ensemble/command.py."""

from rft import cli
from rft.ensemble.command import main

if __name__ == "__main__":
    cli.run(main, ranks=True)
