"""Run by torchrun: ranks measure different times, one cannot compile; each writes its choice."""

import dataclasses
import sys
from pathlib import Path

from rft import dist
from rft.train import fastest
from rft.train.job import Job
from rft.train.kernels import Choice
from tests.ranks.gradients import CPU, build_job

COMPILED = Choice(layers="compiled")
CAM = Choice(layers="compiled", cam="compiled")


def main(folder: Path) -> None:
    with dist.process_group(dist.world_from_env(), CPU) as world:
        # from a global pool, which the ranks exchange in a step: none may wait for one that failed
        job = build_job(world, "object-mask-multi-fill", "global", 1)
        real = fastest.accumulate_gradients
        tried: list[Choice] = []

        def fails_on_one(job: Job, *rest, **options):
            tried.append(job.objective.kernels.choice)
            if world.rank == 1 and tried[-1] == CAM:
                raise RuntimeError("no compiler on this node")
            return real(job, *rest, **options)

        def seconds(job: Job, choice: Choice) -> float:
            fastest.run(job, fastest.load(choice))
            # rank 0 finds the compiled layers faster, rank 1 slower
            slower = (choice == COMPILED) == (world.rank == 1)
            return 2.0 if slower else 1.0

        fastest.accumulate_gradients, fastest.seconds = fails_on_one, seconds
        Job.total_steps = 1000
        found = fastest.fastest(dataclasses.replace(job, world=world), 0)
        text = f"{found}; {'tried' if CAM in tried else 'not tried'}"
        (folder / str(world.rank)).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
