"""Entry point of `python -m rft.predict`: see rft/predict/command.py."""

from rft import cli
from rft.predict.command import main

if __name__ == "__main__":
    cli.run(main)
