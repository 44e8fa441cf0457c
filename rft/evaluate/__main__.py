"""`python -m rft.evaluate`: see rft/evaluate/command.py."""

from rft import cli
from rft.evaluate.command import main

if __name__ == "__main__":
    cli.run(main, ranks=True)
