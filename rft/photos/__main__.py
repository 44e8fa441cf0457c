"""Entry point of `python -m rft.photos`: see rft/photos/command.py."""

import shlex
import sys

from rft import cli
from rft.photos.command import main

if __name__ == "__main__":
    cli.run(main, again=shlex.join(["python", "-m", "rft.photos", *sys.argv[1:]]))
