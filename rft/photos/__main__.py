"""`python -m rft.photos`: see rft/photos/command.py."""

from rft import cli
from rft.photos.command import main

if __name__ == "__main__":
    cli.run(main)
