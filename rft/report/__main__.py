"""`python -m rft.report`: see rft/report/command.py."""

from rft import cli
from rft.report.command import main

if __name__ == "__main__":
    cli.run(main)
