"""Ranks that meet and wait for a file, started by tests/test_safety.py."""

import sys
import time
from pathlib import Path

import torch

from rft import dist

if __name__ == "__main__":
    over, world = Path(sys.argv[1]), dist.world_from_env()
    with dist.process_group(world, torch.device("cpu")):
        ranks = dist.gather_objects(world, world.rank)
        over.with_name(f"met-{world.rank}").write_text(str(ranks))
        while not over.exists():
            time.sleep(0.02)
