"""How fast this machine does what the stages do, measured on the CLIP and the photos in question.

A few seconds for each: a step of each recipe, a forward, some prompts through the text tower, some
photos decoded and resized. The CLIP is loaded for it, so one that cannot be is known before any
photo is packed.
"""

import copy
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rft import cpus, dist, stages
from rft.clip import vit
from rft.clip.classifier import Classifier
from rft.clip.head import zero_shot_head
from rft.clip.load import load_clip
from rft.config import Config, resolve_precision
from rft.packing.encode import encode
from rft.packing.source import Source
from rft.shards.images import encoding_parameters
from rft.storage import documents
from rft.storage.documents import From0, document
from rft.train.rate import ALONE, forward_seconds, step_seconds_of

PHOTOS = 8  # that are decoded
PROMPTS = 8  # that are embedded: open_clip takes whole classes, and this one has so many
PIPE_BYTES = 2**12  # a pipe holds more, so that its writer does not wait


@document(name="rates")
class Rates:
    """Seconds."""

    load: From0
    """To load the CLIP."""
    prompt: From0
    """For each prompt of each class."""
    pack: From0
    """For each photo, by all cores."""
    forward: From0
    """For each image that is predicted."""
    step: dict[str, From0]
    """For each optimizer step of a recipe."""


@dataclass(frozen=True)
class Sample:
    """What is measured: configurations of the trainings, and photos to decode."""

    configs: Mapping[str, Config]
    names: Sequence[str]
    """Of all classes."""
    templates: Sequence[str]
    photos: Sequence[Path]
    size: int
    """Side of the square that is packed."""


def sample_of(sources: Sequence[Source]) -> list[Path]:
    """Return some photos, spread over all."""
    paths = [source.root / item.path for source in sources for item in source.items]
    return paths[:: max(1, len(paths) // PHOTOS)][:PHOTOS]


def measure(sample: Sample) -> Rates:
    """Measure in a process of its own, as the stages after it are forked from this one.

    Raises:
        SystemExit: if it fails, with the exit code; what was wrong is printed.
    """
    read, write = os.pipe()

    def work() -> None:
        # here, so that a mistake is the one line that every command prints
        from rft import cli

        cli.run(lambda: _send(write, measure_here(sample)))

    with os.fdopen(read, "rb") as stream:
        if not stages.FORKS:
            _send(write, measure_here(sample))
        elif code := stages.fork(work):
            raise SystemExit(code)
        os.close(write)
        return documents.decode(stream.read(PIPE_BYTES), Rates, "rates")


def _send(write: int, rates: Rates) -> None:
    os.write(write, json.dumps(asdict(rates)).encode())


def measure_here(sample: Sample) -> Rates:
    """Measure each rate."""
    config = next(iter(sample.configs.values()))
    began = time.perf_counter()
    clip = load_clip(config.model)
    load = time.perf_counter() - began
    device = dist.pick_device(config.device, ALONE)
    precision, _ = resolve_precision(
        config.precision, gpu=device.type == "cuda", bf16=dist.has_bf16(device)
    )
    clip.model.to(device)
    templates = list(sample.templates[:PROMPTS])
    began = time.perf_counter()
    zero_shot_head(clip, sample.names[:1], templates)
    prompt = (time.perf_counter() - began) / len(templates)
    architecture = clip.architecture
    head = nn.Linear(architecture.embed_dim, len(sample.names), device=device)
    student = Classifier(clip.model.visual, head, architecture)
    forward = forward_seconds(student, architecture.image_size, device)
    steps = {}
    for recipe, one in sample.configs.items():
        teacher = copy.deepcopy(student)
        if precision == "bf16":
            vit.lower(teacher.visual, torch.bfloat16)
        learner = copy.deepcopy(student)
        steps[recipe] = step_seconds_of(replace(one, precision=precision), learner, teacher, device)
    return Rates(
        load=load,
        prompt=prompt,
        pack=pack_seconds(sample.photos, sample.size),
        forward=forward,
        step=steps,
    )


def pack_seconds(photos: Sequence[Path], size: int) -> float:
    """Return how long a photo takes if all cores share them; 0 if none can be decoded."""
    encoding: dict[str, Any] = encoding_parameters("pixels", size, 0, photos=True)
    times = []
    for path in photos:
        began = time.perf_counter()
        try:
            encode(path.read_bytes(), str(path), encoding)
        except (OSError, ValueError):  # packing names it, or counts it into --max-bad
            continue
        times.append(time.perf_counter() - began)
    return sum(times) / len(times) / cpus.available() if times else 0.0
