"""Test all peers on the thirteen questions: `python -m benchmarks.peers [--save]`."""

from benchmarks.peers.command import main
from rft import cli

if __name__ == "__main__":
    cli.run(main)
