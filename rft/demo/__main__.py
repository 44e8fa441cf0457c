"""`python -m rft.demo`: see rft/demo/command.py."""

from rft import cli
from rft.demo.command import main

if __name__ == "__main__":
    cli.run(main)
