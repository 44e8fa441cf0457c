"""`--compile`: choice of a run's kernels, by timing them on its GPU.

The choice is stored in checkpoints, because different kernels round differently: a resumed run
keeps its kernels, even if others would be faster on the new machine.
"""

import logging
import time
from dataclasses import replace

import torch

from rft import dist
from rft.clip import vit
from rft.method import relevance
from rft.method.relevance import Through
from rft.train import features
from rft.train.job import Job
from rft.train.kernels import Choice, Kernels, load
from rft.train.step import accumulate_gradients, blank_batch

ROUNDS = 3  # timed steps per choice
WORTH = 120.0  # seconds of eager training, below which compiling would not pay off
# relative to the largest value: sums in a different order, and tf32 products with fewer digits
TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 1e-4}

log = logging.getLogger(__name__)


def choose(job: Job, done: int, recorded: Choice | None) -> Kernels:
    """Choose the kernels for a run after `done` steps; the same on every rank.

    `recorded` is the choice used for those steps, if the run is resumed.

    Raises:
        ValueError: if compiled kernels are requested but cannot be compiled here.
    """
    wanted = job.config.compile
    on_gpu = job.device.type == "cuda"
    if wanted == "off" or (recorded is None and wanted == "auto" and not on_gpu):
        return Kernels()
    # nothing is left to compute, or the run began with eager kernels
    if done >= job.total_steps or (wanted == "auto" and recorded == Choice()):
        return Kernels()
    if wanted == "on":
        choice = Choice(layers="compiled", cam="compiled" if _has_maps(job) else "eager")
    elif recorded is not None:
        choice = recorded
    elif job.config.method.masks and job.config.micro_batch(job.world.size) < 2:
        # each image needs another as its donor, and a rank that tries kernels on its own has none
        return Kernels()
    else:
        return load(fastest(job, done))
    if problem := first_problem(job, choice):
        if wanted == "on":
            raise ValueError(f"--compile on: {problem}; use --compile off")
        log.warning(f"{problem}; this run began with {choice} and continues with eager kernels")
        return Kernels()
    return load(choice)


def fastest(job: Job, done: int) -> Choice:
    """Time all ways to compute a step on blank images, and choose the fastest."""
    world, times = job.world, {Choice(): seconds(job, Choice())}

    def time(choice: Choice) -> None:
        if problem := first_problem(job, choice):
            if world.is_main:
                log.warning(f"{problem}; not used")
        else:
            times[choice] = seconds(job, choice)

    def best() -> Choice:
        # one rank decides, because timings differ between ranks
        return dist.from_main(world, min(times, key=lambda choice: times[choice]))

    steps = job.total_steps - done
    if features.keeps(job) and "student" in job.objective.frozen:
        # later epochs read stored features instead of running the tower
        steps = min(steps, job.batches.plan.steps_per_epoch)
    if dist.from_main(world, steps * times[Choice()] < WORTH):
        return Choice()
    time(Choice(layers="compiled"))
    if _has_maps(job):
        layers = best().layers
        time(Choice(layers=layers, cam="compiled"))
        time(Choice(layers=layers, cam="triton"))
    choice = best()
    if job.device.type == "cuda":
        torch.cuda.empty_cache()  # memory of the trials
    if world.is_main:
        share = times[choice] / times[Choice()]
        log.info(f"{choice}: a step takes {share:.2f} of its eager time, measured here")
    return choice


def _has_maps(job: Job) -> bool:
    return job.config.method.needs_cam and job.config.method.cam == "relevance"


def first_problem(job: Job, choice: Choice) -> str:
    """Try a step with these kernels on every rank; return the first problem, empty if all can."""
    problem = ""
    try:
        kernels = load(choice)
        check(job, kernels.through)
        run(job, kernels)
    # neither compilers nor drivers have one class for their errors
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        problem = f"{choice} cannot be used here ({type(error).__name__}: {reason})"
    return next(filter(None, dist.gather_objects(job.world, problem)), "")


def seconds(job: Job, choice: Choice) -> float:
    """Time a step's gradients: the fastest of several, after a first one that compiles."""
    kernels, found = load(choice), []
    for _ in range(1 + ROUNDS):
        began = time.perf_counter()
        run(job, kernels)
        found.append(time.perf_counter() - began)
    return min(found)


def run(job: Job, kernels: Kernels) -> None:
    """Compute a step's gradients on blank images on this rank alone, and discard them."""
    method = replace(job.config.method, donors="local")
    alone = replace(job, config=replace(job.config, method=method))
    own = job.objective.kernels
    try:
        job.objective.kernels = kernels
        # without the data-parallel wrapper, because a single rank may fail
        accumulate_gradients(alone, job.objective, blank_batch(job), step=-1)
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)
    finally:
        job.objective.kernels = own
        job.objective.zero_grad()


def check(job: Job, through: Through) -> None:
    """Compare a CAM kernel with the eager one, on random inputs.

    Raises:
        ArithmeticError: if they differ by more than the rounding of sums.
    """
    if through is relevance.through_maps:
        return
    draws = torch.Generator().manual_seed(0)
    attention = vit.blocks(job.student.visual)[0].attn
    tokens = 1 + (job.batches.image_size // job.student.patch_side) ** 2
    shape = (2, attention.num_heads, tokens, attention.head_dim)
    dtype = torch.bfloat16 if job.config.precision == "bf16" else torch.float32
    query, key, value, gradient = (
        torch.randn(shape, generator=draws).to(job.device, dtype) for _ in range(4)
    )
    row_BL = torch.rand(2, tokens, generator=draws).to(job.device)
    ours, theirs = (
        way(row_BL, (query, key, value), gradient) for way in (through, relevance.through_maps)
    )
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference < TOLERANCE[job.config.precision]:
        raise ArithmeticError(f"a CAM that differs by {difference:.1e} of its largest value")
