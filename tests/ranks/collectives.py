"""`rft.train` under torch's profiler: rank 0 writes its collectives, step by step, to a file.

The profiler sees the collectives of rft and those of data parallelism, which come from C++. The
optimizer's steps delimit them. The first step includes everything before it, and the last line has
everything after the last step.
"""

import json
import os
import sys
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from rft.train import command as train_command


def main(path: str) -> None:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        train_command.main()
    if os.environ["RANK"] != "0":
        return
    steps: list[list] = [[]]
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        if event.name == "optimizer":
            steps.append([])
        # gloo reports each under its own name, with the shapes of its tensors
        if event.name.startswith("gloo:"):
            steps[-1].append([event.name, event.input_shapes])
    Path(path).write_text("".join(json.dumps(step) + "\n" for step in steps))


if __name__ == "__main__":
    out = sys.argv.pop(1)
    main(out)
