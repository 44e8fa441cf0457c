"""One optimizer step: its time relative to alternatives, and where the time goes."""

import functools
import gc
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import step
from benchmarks.gpu.inputs import Settings
from benchmarks.gpu.runner import Record, each
from rft import dist
from rft.clip.classifier import Classifier
from rft.config import Precision
from rft.train import memory

PRECISION: Precision = "bf16"
EAGER = ("step", "vanilla", "own_vanilla", "textbook", "textbook_tf32")
COMPILED = ("step_compiled", "vanilla_compiled")
TRITON = "step_triton"  # a kernel that only a GPU runs
COUNTED = 8  # images on which operations are counted, which are the same for every image
LARGE_KERNEL = 0.03  # share of the time of all kernels
# also of cuBLAS and the driver, for which torch has no class
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")
SYNCHRONISED = "called a synchronizing CUDA operation"  # torch's warnings


def steps(record: Record, settings: Settings, model: str, names: Sequence[str]) -> None:
    """Time one optimizer step of object-mask-single-fill, and the steps to compare it with."""
    device = use_device(settings)
    student = step.build_classifier(model, settings.classes)
    arguments = step.Arguments(
        model=model,
        batch_size=settings.batch_size,
        classes=settings.classes,
        rounds=settings.rounds,
    )

    def time_one(name: str) -> None:
        values, run = time_step(arguments, device, student, name)
        record.put("steps", name, **values)
        if name == "step":
            look_into(record, run, device, values["seconds"])

    if "step_compiled" in names and device.type == "cuda":
        names = (*names, TRITON)
    each({name: functools.partial(time_one, name) for name in names})


def look_into(
    record: Record, run: Callable[[], None], device: torch.device, seconds: float
) -> None:
    """Record where the time of the training loop's step goes."""
    record.put(host_waits=host_waits(run, device))
    phases = step.phase_seconds(run, device)
    whole = sum(phases.values())
    record.put(phase_share={name: round(value / whole, 4) for name, value in phases.items()})
    record.put(**kernels(run, device, seconds))


def large(record: Record, settings: Settings) -> None:
    """Time a step of a large model at the batch that fits, with and without --recompute."""
    device = use_device(settings)
    record.put(model=settings.large)
    student = step.build_classifier(settings.large, settings.classes)
    plain = step.Arguments(
        model=settings.large,
        batch_size=settings.batch_size,
        classes=settings.classes,
        rounds=max(1, settings.rounds // 2),
    )

    def time_one(name: str) -> None:
        arguments = replace(plain, recompute=name == "recompute")
        values, _ = time_step(arguments, device, student, "step")
        record.put(name, **values)

    each({name: functools.partial(time_one, name) for name in ("step", "recompute")})


def time_step(
    arguments: step.Arguments, device: torch.device, student: Classifier, name: str
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Time one kind of step at the batch that fits; return its values, and the step."""
    # an earlier measurement may have failed half way
    student.zero_grad()
    free(device)
    precision: Precision = "tf32" if name.endswith("_tf32") else PRECISION
    flops = flops_per_image(arguments, device, student, name)
    batch, run, cold = fitting(arguments, device, student, name)
    rounds = step.time_steps({name: run}, arguments.rounds, device)[name]
    seconds = statistics.median(rounds)
    values = {
        "batch_size": batch,
        "precision": precision,
        "seconds": round(seconds, 5),
        "fastest": round(min(rounds), 5),
        "slowest": round(max(rounds), 5),
        "cold_seconds": round(cold, 2),
        "images_per_s": round(batch / seconds, 1),
        "mfu": round(batch * flops / seconds / ceiling(device, precision), 4),
        "peak_memory": step.peak_memory(run, device),
    }
    if name == "step":
        values["dry_run_memory"] = dry_run_memory(arguments, device, student, batch)
    return values, run


def dry_run_memory(
    arguments: step.Arguments, device: torch.device, student: Classifier, batch: int
) -> int | None:
    """Return the bytes that `--dry-run` prints for such a step; None if it only estimates."""
    job = step.build_job(replace(arguments, batch_size=batch), device, PRECISION, student)
    need = memory.needs(job, [1])
    return None if need.estimated else round(need.totals[0])


def flops_per_image(
    arguments: step.Arguments, device: torch.device, student: Classifier, name: str
) -> float:
    """Count the operations of a step's matrix products, forward and backward.

    Of a compiled step, those of the same step as it was written; what --recompute does again is not
    counted.
    """
    few = replace(arguments, batch_size=min(COUNTED, arguments.batch_size), recompute=False)
    plain = step.build_steps(few, device, PRECISION, student)[
        name.removesuffix("_compiled").removesuffix("_triton")
    ]
    return step.count_flops(plain) / few.batch_size


def fitting(
    arguments: step.Arguments, device: torch.device, student: Classifier, name: str
) -> tuple[int, Callable[[], None], float]:
    """Find the largest batch that fits, by halving the requested one.

    Returns:
        The batch, its step, and the seconds of the first call.

    Raises:
        RuntimeError: if not even two images fit, or the step fails for another reason.
    """
    batch, run = arguments.batch_size, None
    while True:
        try:
            smaller = replace(arguments, batch_size=batch)
            run = step.build_steps(smaller, device, PRECISION, student)[name]
            started = time.perf_counter()
            run()
            step.synchronize(device)
            cold = time.perf_counter() - started
            # AdamW allocates its state at the end of the first step
            run()
            step.synchronize(device)
            return batch, run, cold
        except RuntimeError as error:
            if batch < 4 or not any(words in str(error) for words in OUT_OF_MEMORY):
                raise
        run = None
        batch //= 2
        student.zero_grad()
        free(device)


def free(device: torch.device) -> None:
    """Release the memory of earlier measurements."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def use_device(settings: Settings) -> torch.device:
    """Choose the device to measure on."""
    return dist.pick_device(settings.device, step.WORLD)


@functools.cache
def ceiling(device: torch.device, precision: Precision) -> float:
    """Measure the operations per second of the fastest matrix product, once per process."""
    return step.matmul_ceiling(device, precision)


def host_waits(run: Callable[[], None], device: torch.device) -> dict[str, int] | None:
    """Count how often a step made the host wait for the GPU, by line of code; None on a CPU."""
    if device.type != "cuda":
        return None
    step.synchronize(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if SYNCHRONISED in str(warning.message)]
    return dict(Counter(f"{Path(wait.filename).name}:{wait.lineno}" for wait in waits))


def kernels(
    run: Callable[[], None], device: torch.device, seconds_of_step: float
) -> dict[str, Any]:
    """Find the kernels that take more than 3% of a step, and the share of the step with kernels.

    On a CPU it is the operators that are listed.

    Args:
        run: the step.
        device: where it runs.
        seconds_of_step: without a profiler, which slows the host down and kernels hardly.
    """
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    for _ in range(2):  # the first profile includes the start of the tools
        with profile(activities=activities) as profiler:
            run()
            step.synchronize(device)
    seconds: Counter[str] = Counter()
    count = 0
    for event in profiler.key_averages():
        on_gpu = event.device_type != torch.autograd.DeviceType.CPU
        # the phases named in the training code are not kernels
        if on_gpu != gpu or getattr(event, "is_user_annotation", False):
            continue
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        seconds[event.key] += spent / 1e6
        count += event.count
    total = sum(seconds.values())
    shares = {name: value / total for name, value in seconds.most_common() if total}
    return {
        "kernels": {name: round(v, 4) for name, v in shares.items() if v > LARGE_KERNEL},
        "kernel_launches": count,
        "busy_share": round(total / seconds_of_step, 4) if gpu else None,
    }
