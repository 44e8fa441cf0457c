"""Entry point of `python -m rft.data.show`: see rft/loading/show.py."""

from rft import cli
from rft.loading.show import main

if __name__ == "__main__":
    cli.run(main)
