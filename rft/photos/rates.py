"""Measures this machine's speed in the stages' main operations, with the actual CLIP and photos.

A few seconds each: an optimizer step per recipe, a forward pass, some prompts through the text
tower, some photos decoded and resized. This loads the CLIP, so a model that cannot be loaded is
noticed before any photo is packed.
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

PHOTOS = 8  # decoded photos
PROMPTS = 8  # embedded prompts: open_clip embeds complete classes, so one class gets this many
PIPE_BYTES = 2**12  # less than a pipe's buffer, so that the writer never blocks


@document(name="rates")
class Rates:
    """Measured times, in seconds."""

    load: From0
    """To load the CLIP."""
    prompt: From0
    """Per prompt of each class."""
    pack: From0
    """Per photo, with all cores."""
    forward: From0
    """Per predicted image."""
    step: dict[str, From0]
    """Per optimizer step, by recipe."""


@dataclass(frozen=True)
class Sample:
    """The input of the measurements: configurations of the trainings, and photos to decode."""

    configs: Mapping[str, Config]
    names: Sequence[str]
    """Of all classes."""
    templates: Sequence[str]
    photos: Sequence[Path]
    size: int
    """Side of the square that is packed."""


def sample_of(sources: Sequence[Source]) -> list[Path]:
    """Choose some photos, evenly spread over all."""
    paths = [source.root / item.path for source in sources for item in source.items]
    return paths[:: max(1, len(paths) // PHOTOS)][:PHOTOS]


def measure(sample: Sample) -> Rates:
    """Measure in a separate process, because the stages are later forked from this one.

    Raises:
        SystemExit: if it fails, with its exit code; it has already printed the error.
    """
    read, write = os.pipe()

    def work() -> None:
        # with rft.cli, so that an error becomes one line, as in every command
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
    # one class with few prompts: the plan multiplies by all classes and prompts
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
        # copies: optimizer steps change the weights, and the next recipe starts from the same ones
        teacher = copy.deepcopy(student)
        # as in training (rft/train/build.py)
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
    """Measure the seconds per photo if all cores share the work; 0 if none can be decoded."""
    encoding: dict[str, Any] = encoding_parameters("pixels", size, 0, photos=True)
    times = []
    for path in photos:
        began = time.perf_counter()
        try:
            encode(path.read_bytes(), str(path), encoding)
        except (OSError, ValueError):  # packing reports it, or counts it towards --max-bad
            continue
        times.append(time.perf_counter() - began)
    return sum(times) / len(times) / cpus.available() if times else 0.0
