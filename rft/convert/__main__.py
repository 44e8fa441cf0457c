"""`python -m rft.convert`: see rft/convert/command.py."""

from rft import cli
from rft.convert.command import main

if __name__ == "__main__":
    cli.run(main)
