"""python -m benchmarks.peers.on_rft."""

from rft import cli


def main() -> None:
    """Answer the questions."""
    from benchmarks.peers import program
    from benchmarks.peers.on_rft.peer import PEER

    program.main(PEER, ("rft", "torch"))


if __name__ == "__main__":
    cli.run(main)
