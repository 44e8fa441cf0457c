"""`python -m rft.merge`: see rft/merge/command.py."""

from rft import cli
from rft.merge.command import main

if __name__ == "__main__":
    cli.run(main, ranks=True)
