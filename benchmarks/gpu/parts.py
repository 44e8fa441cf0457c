"""What is measured, most valuable first; every part is a function of a record and the settings.

A part puts what it knows into its record as soon as it knows it, because its time may end before it
does. Rates are images per second, memory is bytes, times are seconds.
"""

import contextlib
import functools
import gc
import json
import os
import runpy
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import step
from benchmarks.gpu import inputs
from benchmarks.gpu.group import difference
from benchmarks.gpu.inputs import Settings
from benchmarks.gpu.runner import Part, Record
from rft import dist, files
from rft.clip.classifier import LAST, Classifier, load_state
from rft.clip.head import zero_shot_head
from rft.clip.load import MINIATURE, load_clip
from rft.config import ModelConfig, Precision
from rft.data import encode
from rft.data.loader import PackedDataset
from rft.demo import captions, objects, scenes
from rft.demo.pretrain import draw_captioned
from rft.evaluate.evaluator import count_correct
from rft.method import masking, relevance

ROOT = Path(__file__).parents[2]
PRECISION: Precision = "bf16"
LARGE_KERNEL = 0.03  # share of the time of all kernels
THRESHOLDS = (0.3, 0.6)  # of object masks: the smallest and the largest that the paper tries
EAGER = ("step", "vanilla", "textbook", "textbook_tf32")
COMPILED = ("vanilla_compiled", "step_compiled")
KINDS: tuple[encode.Kind, ...] = ("pixels", "jpeg")
SYNCHRONISED = "called a synchronizing CUDA operation"  # what torch warns of
GROUPED = 64  # images of the step that is run in a process group
COUNTED = 8  # images on which operations are counted, which are the same for every image


def all_parts(settings: Settings) -> list[Part]:
    """Return the parts in the order of their value."""

    def part(
        name: str, work: Callable[..., None], least: float, most: float, *options: Any
    ) -> Part:
        return Part(
            name=name,
            work=lambda record: work(record, settings, *options),
            least=least,
            most=most,
        )

    return [
        part("chip", chip, 5, 40),
        *(part(f"step-{model}", steps, 15, 90, model, EAGER) for model in settings.models),
        part("trainer", trainer, 30, 150),
        part("tests", gpu_tests, 20, 90),
        # a part of its own: compiling takes longer than everything else about a step
        *(part(f"compiled-{m}", steps, 30, 150, m, COMPILED) for m in settings.models),
        part("masks", masks, 10, 45),
        part("large", large, 15, 60),
        part("resume", resume, 40, 120),
        part("evaluation", evaluation, 15, 60),
    ]


def use_device(settings: Settings) -> torch.device:
    """Return the device to measure on."""
    return dist.pick_device(settings.device, step.WORLD)


def gpu_name(settings: Settings) -> str:
    """Return the name of the GPU, asked for in another process.

    Raises:
        ValueError: if torch sees none.
    """
    path = settings.work / "gpu-name"
    path.unlink(missing_ok=True)
    in_fork(lambda: path.write_text(name_in_torch()))
    name = path.read_text()
    if not name:
        raise ValueError("torch sees no GPU here; --rehearse runs every part on a CPU")
    return name


def name_in_torch() -> str:
    """Return the name of the first GPU; empty if there is none."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


def chip(record: Record, settings: Settings) -> None:
    """Record the hardware, and the two ceilings that everything else is held against."""
    device = use_device(settings)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record.put(
            name=properties.name,
            memory=properties.total_memory,
            multiprocessors=properties.multi_processor_count,
            compute_capability=f"{properties.major}.{properties.minor}",
            driver=driver(),
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            nccl=".".join(map(str, torch.cuda.nccl.version())),
        )
    else:
        record.put(name="CPU")
    precisions: tuple[Precision, ...] = ("bf16", "tf32", "fp32")
    for precision in precisions:
        record.put("matmul_flops", **{precision: round(ceiling(device, precision))})
    record.put(**copy_rates(device))


@functools.cache
def ceiling(device: torch.device, precision: Precision) -> float:
    """Return the operations per second of the fastest matrix product, measured once a process."""
    return step.matmul_ceiling(device, precision)


def driver() -> str | None:
    """Return the version of the GPU's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return result.stdout.split("\n")[0].strip()
    return None


def copy_rates(device: torch.device) -> dict[str, int]:
    """Return bytes per second: within the device (read and written), and from pinned memory."""
    gpu = device.type == "cuda"
    count = 2**30 if gpu else 2**24
    source, target = (torch.empty(count, dtype=torch.uint8, device=device) for _ in range(2))
    source.random_()
    host = torch.empty(count // 4, dtype=torch.uint8, pin_memory=gpu).random_()
    copies: dict[str, tuple[int, Callable[[], Any]]] = {
        "copy_bytes_per_s": (2 * count, lambda: target.copy_(source)),
        "host_to_device_bytes_per_s": (
            len(host),
            lambda: target[: len(host)].copy_(host, non_blocking=True),
        ),
    }
    rates = {}
    for name, (size, work) in copies.items():
        seconds = step.time_steps({name: work}, 10, device)[name]
        rates[name] = round(size / statistics.median(seconds))
    return rates


def steps(record: Record, settings: Settings, model: str, names: Sequence[str]) -> None:
    """Time one optimizer step of object-mask-single-fill, and of what it is compared with.

    Raises:
        RuntimeError: after all others were timed, if one of them failed.
    """
    device = use_device(settings)
    student = step.build_classifier(model, settings.classes)
    arguments = step.Arguments(
        model=model, batch_size=settings.batch_size, classes=settings.classes
    )
    failures = []
    for name in names:
        try:
            time_step(record, settings, arguments, device, student, name)
        except Exception as error:  # one that does not run here says nothing of the others
            traceback.print_exc()
            failures.append(f"{name}: {files.reason(error)[:200]}")
            student.zero_grad()
        free(device)
    if failures:
        raise RuntimeError("; ".join(failures))


def time_step(
    record: Record,
    settings: Settings,
    arguments: step.Arguments,
    device: torch.device,
    student: Classifier,
    name: str,
) -> None:
    """Time one kind of step; of the training loop's, see where its time goes."""
    precision: Precision = "tf32" if name.endswith("_tf32") else PRECISION
    ideal = flops_per_image(arguments, device, student, name)
    ideal /= ceiling(device, precision)
    batch, run, cold = fitting(arguments, device, student, name)
    seconds = step.time_steps({name: run}, settings.rounds, device)[name]
    record.put("steps", name, precision=precision, **timing(batch, seconds, cold, ideal))
    record.put("steps", name, peak_memory=step.peak_memory(run, device))
    if name == "step":
        record.put(host_waits=host_waits(run, device))
        phases = step.phase_seconds(run, device)
        whole = sum(phases.values())
        record.put(phase_share={key: round(value / whole, 4) for key, value in phases.items()})
        record.put(**kernels(run, device))


def timing(
    batch: int, seconds: Sequence[float], cold: float, ideal_seconds_per_image: float
) -> dict[str, Any]:
    """Return how a step's rounds are recorded."""
    median = statistics.median(seconds)
    return {
        "batch_size": batch,
        "seconds": round(median, 5),
        "fastest": round(min(seconds), 5),
        "slowest": round(max(seconds), 5),
        "cold_seconds": round(cold, 2),
        "images_per_s": round(batch / median, 1),
        "mfu": round(batch * ideal_seconds_per_image / median, 4),
    }


def flops_per_image(
    arguments: step.Arguments, device: torch.device, student: Classifier, name: str
) -> float:
    """Return the operations of a step's matrix products, forward and backward.

    Of a compiled step, those of the same step as it was written.
    """
    few = replace(arguments, batch_size=min(COUNTED, arguments.batch_size), recompute=False)
    plain = step.build_steps(few, device, PRECISION, student)[name.removesuffix("_compiled")]
    return step.count_flops(plain) / few.batch_size


def fitting(
    arguments: step.Arguments, device: torch.device, student: Classifier, name: str
) -> tuple[int, Callable[[], None], float]:
    """Return the largest batch that fits, halved from the one asked for, its step and first time.

    Raises:
        torch.cuda.OutOfMemoryError: if not even two images fit.
    """
    batch = arguments.batch_size
    while True:
        try:
            smaller = replace(arguments, batch_size=batch)
            run = step.build_steps(smaller, device, PRECISION, student)[name]
            started = time.perf_counter()
            run()
            step.synchronize(device)
            return batch, run, time.perf_counter() - started
        except torch.cuda.OutOfMemoryError:
            if batch < 4:  # a fill needs another image
                raise
        batch //= 2
        student.zero_grad()
        free(device)


def free(device: torch.device) -> None:
    """Give back the memory of what was measured before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def host_waits(run: Callable[[], None], device: torch.device) -> dict[str, int] | None:
    """Return how often a step made the host wait for the GPU, by place; None on a CPU."""
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


def kernels(run: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Return the kernels that take more than 3% of a step, and how much of it kernels fill.

    On a CPU it is the operators that are listed.
    """
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with profile(activities=activities) as profiler:
        started = time.perf_counter()
        run()
        step.synchronize(device)
        whole = time.perf_counter() - started
    seconds: Counter[str] = Counter()
    count = 0
    for event in profiler.key_averages():
        on_gpu = event.device_type != torch.autograd.DeviceType.CPU
        # the phases that the training code names are no kernels
        if on_gpu != gpu or getattr(event, "is_user_annotation", False):
            continue
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        seconds[event.key] += spent / 1e6
        count += event.count
    total = sum(seconds.values())
    shares = {name: value / total for name, value in seconds.most_common() if total}
    return {
        "kernels": {n[:120]: round(v, 4) for n, v in shares.items() if v > LARGE_KERNEL},
        "kernel_launches": count,
        "busy_share": round(total / whole, 4) if gpu else None,
    }


def trainer(record: Record, settings: Settings) -> None:
    """Time the whole training command, with loader, logs and checkpoint, one epoch."""
    largest = settings.models[-1]
    # the most telling first; where images come from a decoder, the fastest model shows it most
    cases = [(model, kind) for kind in KINDS for model in reversed(settings.models)]
    cases.sort(key=lambda case: case == (largest, "jpeg"))
    for model, encoding in cases:
        started = time.perf_counter()
        prepare(settings, model, encoding)
        made = time.perf_counter() - started
        folder = settings.work / f"run-{model}-{encoding}"
        forget(folder)
        started = time.perf_counter()
        in_fork(partial(run_module, "rft.train", train_command(settings, model, encoding, folder)))
        took = time.perf_counter() - started
        values = rates(folder, settings)
        record.put(model, encoding, **values, whole_seconds=round(took, 1), making=round(made, 1))


def prepare(settings: Settings, model: str, encoding: encode.Kind) -> None:
    """Make the inputs of a training, in a process of its own, so that more can be forked from this.

    A fork of a process whose torch has begun to use several threads can hang.
    """

    def make() -> None:
        inputs.write_shards(settings, encoding, inputs.image_size(model))
        inputs.write_clip(settings, model)

    in_fork(make)


def train_command(settings: Settings, model: str, encoding: encode.Kind, folder: Path) -> list[str]:
    """Return the command line of a training, without the program."""
    data = inputs.write_shards(settings, encoding, inputs.image_size(model))
    options = {
        "data": data,
        "run-dir": folder,
        "model.clip": inputs.write_clip(settings, model),
        "device": settings.device,
        "precision": PRECISION,
        "loader.batch-size": settings.batch_size,
        "loader.held-out": 0,
        "loader.workers": settings.workers,
        "optim.epochs": 1,
        "log.every-steps": max(1, settings.steps // 6),
        "log.checkpoint-steps": 10**6,
        "log.image-steps": 0,
    }
    words = (word for name, value in options.items() for word in (f"--{name}", str(value)))
    return ["object-mask-single-fill", *words]


def rates(folder: Path, settings: Settings) -> dict[str, float]:
    """Return a run's rate and its share of waiting for data, without the first third."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "images_per_s" in row]
    every = max(1, settings.steps // 6)
    warm = [row for row in rows if row["step"] > settings.steps / 3]
    seconds = [every * settings.batch_size / row["images_per_s"] for row in warm]
    waiting = sum(every * row["data_wait_ms"] / 1000 for row in warm)
    return {
        "images_per_s": round(len(warm) * every * settings.batch_size / sum(seconds), 1),
        "waiting_share": round(waiting / sum(seconds), 4),
        "steps": len(warm) * every,
    }


def forget(folder: Path) -> None:
    """Delete what an earlier call left of a run."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def in_fork(work: Callable[[], object]) -> None:
    """Run `work` in a copy of this process, which has neither touched the GPU nor computed.

    Raises:
        RuntimeError: if it did not end well; what it printed is in the part's log.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 1
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise RuntimeError(f"it ended with {status}; its output is above")


def run_module(name: str, words: Sequence[str]) -> None:
    """Run a module as `python -m NAME WORDS`, in this process."""
    sys.argv = [name, *words]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def gpu_tests(record: Record, settings: Settings) -> None:
    """Run tests/gpu: what only a GPU can show."""
    report = settings.work / "gpu-tests.xml"
    words = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(ROOT / "tests" / "gpu")]
    code = pytest.main(words)
    results = ElementTree.parse(report).getroot()
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failed = []
    for case in results.iter("testcase"):
        bad = case.find("failure") is not None or case.find("error") is not None
        kind = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        counts[kind] += 1
        if bad:
            failed.append(case.get("name"))
    record.put(**counts, names_of_failed=failed)
    if counts["failed"] or not sum(counts.values()):
        raise RuntimeError(f"pytest ended with {code}: {counts}")


def masks(record: Record, settings: Settings) -> None:
    """Compare object masks between precisions: shares of equal patches.

    Random weights say little of sharp attention, so the tiny CLIP that comes with rft, which was
    trained, looks at images of its own world too.
    """
    device = use_device(settings)
    for model in settings.models:
        student = step.build_classifier(model, settings.classes).to(device)
        size, generator = student.architecture.image_size, torch.Generator().manual_seed(0)
        shape = (64, 3, size, size)
        images_BCHW = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        labels_B = torch.randint(settings.classes, (64,), generator=generator)
        compare_masks(record, model, student, images_BCHW, labels_B)
    clip = load_clip(ModelConfig(clip=MINIATURE, pretrained=""))
    head = zero_shot_head(clip, objects.CLASSES, captions.TEMPLATES)
    trained = Classifier(clip.model.visual, head, clip.architecture).to(device)
    setting = scenes.Setting(bank="dev", styles={"photo": 1.0}, contexts="usual")
    try:
        seen = draw_captioned("gpu benchmark", setting, 192, 0)
    except ModuleNotFoundError as error:
        # its world is made of scans that come with scikit-learn, which weighs too much to carry
        record.put(MINIATURE, not_measured=f"{error.name} is not installed")
        return
    compare_masks(record, MINIATURE, trained, seen.images_BCHW, seen.labels_B)


def compare_masks(
    record: Record,
    name: str,
    model: Classifier,
    images_BCHW: torch.Tensor,
    labels_B: torch.Tensor,
) -> None:
    """Record how the masks of one model agree."""
    device = model.head.weight.device
    images_BCHW, labels_B = images_BCHW.to(device), labels_B.to(device)
    maps = {}
    precisions: tuple[Precision, ...] = ("fp32", "tf32", "bf16")
    for precision in precisions:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        taps: list[Any] = []
        with step.autocast(device, precision):
            logits_BK = model.logits(model.features(model.patches(images_BCHW), taps=taps))
            relevance_BP = relevance.label_relevance(logits_BK, labels_B, taps)
        maps[precision] = relevance.normalise(relevance_BP)
    for threshold in THRESHOLDS:
        found = {name: masking.object_mask(cam, threshold) for name, cam in maps.items()}
        exact = found["fp32"]
        record.put(
            name,
            str(threshold),
            masked=round(exact.float().mean().item(), 4),
            **{n: round((found[n] == exact).float().mean().item(), 6) for n in ("tf32", "bf16")},
        )


def large(record: Record, settings: Settings) -> None:
    """Time a step of a large model at the batch that fits, as it is and with --recompute."""
    device = use_device(settings)
    student = step.build_classifier(settings.large, settings.classes)
    for recompute in (False, True):
        arguments = step.Arguments(
            model=settings.large,
            batch_size=settings.batch_size,
            classes=settings.classes,
            recompute=recompute,
        )
        # operations that are done again are not counted as useful
        flops = flops_per_image(arguments, device, student, "step")
        batch, run, cold = fitting(arguments, device, student, "step")
        seconds = step.time_steps({"step": run}, max(1, settings.rounds // 2), device)["step"]
        values = timing(batch, seconds, cold, flops / ceiling(device, PRECISION))
        name = "recompute" if recompute else "step"
        record.put(name, **values, peak_memory=step.peak_memory(run, device))
        record.put(model=settings.large)
        del run
        free(device)


def resume(record: Record, settings: Settings) -> None:
    """Run one rank under torchrun: the group of several GPUs, then a stop and a resumed run."""
    model = settings.models[0]
    prepare(settings, model, "pixels")
    record.put(model=model)
    sizes = (str(min(settings.batch_size, GROUPED)), str(settings.classes))
    command = [*launcher(), "benchmarks.gpu.group", model, settings.device, *sizes]
    result = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True)
    record.put(group=json.loads(result.stdout.splitlines()[-1]))
    folders = {name: settings.work / f"resume-{name}" for name in ("whole", "again", "stopped")}
    for folder in folders.values():
        forget(folder)
    for name in ("whole", "again"):
        in_fork(partial(run_module, "rft.train", resume_command(settings, folders[name])))
    record.put(two_runs=compare_runs(folders["whole"], folders["again"]))
    record.put(stopped_after=stop_and_resume(settings, folders["stopped"]))
    record.put(resumed_run=compare_runs(folders["whole"], folders["stopped"]))


def launcher() -> list[str]:
    """Return torchrun's command for one rank, up to the module's name."""
    return [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=1",
            "-m",
        ),
    ]


def resume_command(settings: Settings, folder: Path) -> list[str]:
    """Return the training command that is stopped and resumed: the smallest model, on pixels."""
    return [
        *train_command(settings, settings.models[0], "pixels", folder),
        *("--log.every-steps", "1", "--cluster.stop-file", f"{folder}.stop"),
    ]


def stop_and_resume(settings: Settings, folder: Path) -> int:
    """Stop a run under torchrun in its middle and run it to its end; return where it stopped."""
    stop, metrics = Path(f"{folder}.stop"), folder / "metrics.jsonl"
    stop.unlink(missing_ok=True)
    command = [*launcher(), "rft.train", *resume_command(settings, folder)]
    process = subprocess.Popen(command, cwd=ROOT)
    while process.poll() is None:
        seen = metrics.read_text().count("\n") if metrics.exists() else 0
        if seen >= settings.steps // 3:
            stop.touch()
        time.sleep(0.002)
    stop.unlink(missing_ok=True)
    progress = json.loads((folder / "progress.json").read_text())
    if (folder / "training.json").exists():
        raise RuntimeError("the run ended before it was stopped")
    subprocess.run(command, cwd=ROOT, check=True)
    return progress["step"]


def compare_runs(left: Path, right: Path) -> dict[str, Any]:
    """Return whether two runs' last weights are equal, and by how much they are not."""
    ours, theirs = (load_state(folder / LAST)[0] for folder in (left, right))
    return difference(ours, theirs)


def evaluation(record: Record, settings: Settings) -> None:
    """Count images as `rft.evaluate` does: fp32, with its loader."""
    device = use_device(settings)
    for model in settings.models:
        size = inputs.image_size(model)
        root = inputs.write_shards(settings, "pixels", size)
        packed = PackedDataset(str(root / inputs.SET))
        classifier = step.build_classifier(model, settings.classes).eval().to(device)
        samples = np.arange(min(len(packed), EVALUATED))
        arrived: list[tuple[float, int]] = []
        count_correct(
            [classifier],
            packed,
            image_size=size,
            world=step.WORLD,
            device=device,
            samples=samples,
            batch_size=min(256, settings.batch_size),
            workers=settings.workers,
            progress=lambda images, times=arrived: times.append((time.perf_counter(), images)),
        )
        # the loader's start is not part of the rate; the host has waited for all counts
        seconds = time.perf_counter() - arrived[0][0]
        images = sum(count for _, count in arrived[1:])
        record.put(model, images_per_s=round(images / seconds, 1), images=images)


EVALUATED = 10_240  # images: seconds for the largest model
