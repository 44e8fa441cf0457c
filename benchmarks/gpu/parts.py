"""The measured parts, most valuable first; each is a function of a record and the settings.

A part writes every result to its record immediately, because its time may run out. Rates are images
per second, memory is bytes, times are seconds.
"""

import contextlib
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from benchmarks import step
from benchmarks.gpu import inputs
from benchmarks.gpu.inputs import Settings
from benchmarks.gpu.runner import Part, Record, each
from benchmarks.gpu.runs import in_fork, resume, trainer
from benchmarks.gpu.steps import COMPILED, EAGER, ceiling, large, steps, use_device
from rft.clip.classifier import Classifier
from rft.clip.head import zero_shot_head
from rft.clip.load import MINIATURE, load_clip
from rft.config import ModelConfig, Precision
from rft.demo import captions, objects, scenes, world
from rft.demo.pretrain import draw_captioned
from rft.evaluate.count import count_correct
from rft.loading.dataset import PackedDataset
from rft.method import masking, relevance

ROOT = Path(__file__).parents[2]
THRESHOLDS = (0.3, 0.6)  # of object masks: the smallest and the largest in the paper
EVALUATED = 10_240  # images: seconds for the largest model


def all_parts(settings: Settings) -> list[Part]:
    """List the parts in the order of their value."""

    def part(
        name: str, work: Callable[..., None], least: float, most: float, *options: Any, **named: Any
    ) -> Part:
        return Part(
            name=name,
            work=lambda record: work(record, settings, *options, **named),
            least=least,
            # on a busy CPU, compilers may take any time
            most=math.inf if settings.device == "cpu" else most,
        )

    return [
        # name, work, minimum seconds to start it, seconds after which it is ended
        part("chip", chip, 5, 40),
        *(part(f"step-{model}", steps, 15, 90, model, EAGER) for model in settings.models),
        part("trainer", trainer, 30, 150),
        part("tests", gpu_tests, 20, 90),
        # a separate part: compiling takes longer than everything else about a step
        *(part(f"compiled-{m}", steps, 30, 150, m, COMPILED) for m in settings.models),
        part("compiled-trainer", trainer, 30, 150, compiled=True),
        part("masks", masks, 10, 45),
        part("large", large, 15, 60),
        part("resume", resume, 40, 120),
        part("evaluation", evaluation, 15, 60),
    ]


def gpu_name(settings: Settings) -> str:
    """Ask torch for the name of the GPU, in a separate process.

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
    """Ask torch for the name of the first GPU; empty without one."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


def chip(record: Record, settings: Settings) -> None:
    """Record the hardware, and the two ceilings to which all figures are compared."""
    device = use_device(settings)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record.put(
            name=properties.name,
            memory=properties.total_memory,
            multiprocessors=properties.multi_processor_count,
            compute_capability=f"{properties.major}.{properties.minor}",
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


def driver() -> str | None:
    """Query the version of the GPU's driver; None if nothing answers."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return result.stdout.split("\n")[0].strip()
    return None


def copy_rates(device: torch.device) -> dict[str, int]:
    """Measure bytes per second: within the device (read and written), and from pinned memory."""
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


def gpu_tests(record: Record, settings: Settings) -> None:
    """Run tests/gpu, which test what only a GPU can show.

    Raises:
        RuntimeError: if a test failed, or on a GPU if none ran.
    """
    report = settings.work / "gpu-tests.xml"
    # do not load pytest plugins that happen to be installed
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    words = ["-q", "-p", "no:cacheprovider", "-p", "pytest_timeout", f"--junitxml={report}"]
    code = pytest.main([*words, str(ROOT / "tests" / "gpu")])
    results = ElementTree.parse(report).getroot()
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failed = []
    for case in results.iter("testcase"):
        bad = case.find("failure") is not None or case.find("error") is not None
        kind = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        counts[kind] += 1
        if bad:
            failed.append(str(case.get("name")))
    record.put(**counts, names_of_failed=failed)
    wanted = counts["passed"] if settings.device == "cuda" else counts["skipped"]
    if failed or not wanted:
        raise RuntimeError(f"pytest ended with {code}: {', '.join(failed) or counts}")


def masks(record: Record, settings: Settings) -> None:
    """Compare object masks between precisions: shares of equal patches.

    Random weights say little of sharp attention, so the tiny CLIP that comes with rft, which was
    trained, looks at images of its own world too.
    """
    device = use_device(settings)
    for model in settings.models:
        student = step.build_classifier(model, settings.classes).to(device)
        arguments = step.Arguments(batch_size=64, classes=settings.classes)
        batch = step.random_batch(arguments, device, student.architecture.image_size)
        compare_masks(record, model, student, batch.images_BCHW, batch.labels_B)
    clip = load_clip(ModelConfig(clip=MINIATURE, pretrained=""))
    head = zero_shot_head(clip, objects.CLASSES, captions.TEMPLATES)
    trained = Classifier(clip.model.visual, head, clip.architecture).to(device)
    setting = scenes.Setting(bank="dev", styles={"photo": 1.0}, contexts="usual")
    images = world.WorldSet(setting=setting, images=192)
    try:
        seen = draw_captioned("gpu benchmark", images, 0)
    except ModuleNotFoundError as error:
        # its world is made of images that ship with scikit-learn, which is too large to carry
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
    """Record the agreement of one model's masks between precisions."""
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


def evaluation(record: Record, settings: Settings) -> None:
    """Count images like `rft.evaluate`: fp32, with its loader."""
    device = use_device(settings)

    def count(model: str) -> None:
        size = inputs.image_size(model)
        root = inputs.write_shards(settings, "pixels", size)
        packed = PackedDataset(str(root / inputs.SET))
        classifier = step.build_classifier(model, settings.classes).eval().to(device)
        arrived: list[tuple[float, int]] = []
        count_correct(
            [classifier],
            packed,
            image_size=size,
            world=step.WORLD,
            device=device,
            samples=np.arange(min(len(packed), EVALUATED)),
            batch_size=min(256, settings.batch_size),
            workers=settings.workers,
            progress=lambda images: arrived.append((time.perf_counter(), images)),
        )
        # the rate excludes the loader's start; the host has waited for all counts
        seconds = time.perf_counter() - arrived[0][0]
        images = sum(number for _, number in arrived[1:])
        record.put(model, images_per_s=round(images / seconds, 1), images=images)

    each({model: partial(count, model) for model in settings.models})
