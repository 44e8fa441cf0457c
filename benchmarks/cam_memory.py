"""Memory cost of a CAM: `python -m benchmarks.cam_memory --model ViT-L-14-336`.

Each case runs in its own process: one clean forward and the class activation maps of all its
images, with the graph kept for the loss, as in a training step. Its memory is the peak of the
process minus the model itself.
  textbook   stores the maps of all layers, their gradients and the relevance matrix in full;
  step       the training loop: recomputes maps from queries and keys, one layer at a time;
  recompute  the training loop with --recompute, which keeps only each layer's input.
Small batches give the memory per image. Then each case is tried at --images under a limit of
--limit-gb beyond the model. The last line is one JSON object.
"""

import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.step import RESULTS, build_classifier, forward_with_maps
from rft import cli
from rft.method import relevance
from rft.storage import files

CASES = ("textbook", "step", "recompute")
FAILED = 3  # exit code of a child that ran out of memory


@dataclass(frozen=True)
class Arguments:
    """Measure the memory of a clean forward and its CAM, fp32, on the CPU."""

    model: str = "ViT-L-14-336"
    """open_clip model name; its weights are random."""
    images: int = 64
    small: tuple[int, int] = (2, 4)
    """Two smaller batches, whose difference gives the memory per image."""
    limit_gb: float = 20.0
    """Memory that a process may use beyond the model."""
    save: bool = False
    """Also write the result to benchmarks/results/."""


def run_case(case: str, model: str, images: int, limit_bytes: int) -> int:
    """Return the peak memory in bytes beyond the model, limited to `limit_bytes`."""
    classifier = build_classifier(model, 1000)
    size = classifier.architecture.image_size
    pixels_BCHW = torch.randint(256, (images, 3, size, size), dtype=torch.uint8)
    labels_B = torch.arange(images)
    most = memory("VmData") + limit_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    # exclude the peak of building the model
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    if case == "textbook":
        features_BE, maps = forward_with_maps(classifier, pixels_BCHW)
        logits_BK = classifier.logits(features_BE)
        score = logits_BK.gather(1, labels_B[:, None]).sum()
        gradients = torch.autograd.grad(score, maps, retain_graph=True)
        matrix_BLL = torch.eye(maps[0].shape[-1]).expand(images, -1, -1)
        for map_BNLL, gradient_BNLL in zip(maps, gradients, strict=True):
            attention_BLL = (gradient_BNLL * map_BNLL.detach()).relu().mean(dim=1)
            matrix_BLL = matrix_BLL + attention_BLL @ matrix_BLL
        relevance_BP = matrix_BLL[:, 0, 1:]
    else:
        taps: list[Any] = []
        patches_BPV = classifier.patches(pixels_BCHW)
        recompute = case == "recompute"
        features_BE = classifier.features(patches_BPV, taps=taps, recompute=recompute)
        logits_BK = classifier.logits(features_BE)
        relevance_BP = relevance.label_relevance(logits_BK, labels_B, taps)
    assert logits_BK.requires_grad, "the graph is there for the loss"
    assert torch.isfinite(relevance_BP).all()
    return memory("VmHWM") - before


def memory(field: str) -> int:
    """Return a figure of this process's memory in bytes (VmRSS now, VmHWM at most)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def child(case: str, model: str, images: int, limit_bytes: int) -> None:
    """Run one case under a limit; print its memory, or exit with FAILED if that is too little."""
    try:
        print(run_case(case, model, images, limit_bytes))
    except (MemoryError, RuntimeError) as error:
        if "allocate memory" not in str(error):
            raise
        sys.exit(FAILED)


def measure_case(case: str, arguments: Arguments, images: int) -> int | None:
    """Return the memory of a case in its own process, or None if it does not fit the limit.

    Raises:
        ValueError: if the process ended otherwise.
    """
    limit = str(int(arguments.limit_gb * 1e9))
    command = [sys.executable, "-m", "benchmarks.cam_memory", "child", case, arguments.model]
    # return freed memory at once and use no spare arenas, so that the peak is the memory in use
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    result = subprocess.run(
        [*command, str(images), limit], env=environment, capture_output=True, text=True
    )
    if result.returncode == FAILED:
        return None
    if result.returncode:
        raise ValueError(f"{case} with {images} images failed: {result.stderr.strip()[-300:]}")
    return int(result.stdout.split()[-1])


def measure(arguments: Arguments) -> dict[str, Any]:
    """Collect the document to save."""
    few, more = arguments.small
    per_image, whole = {}, {}
    for case in CASES:
        low, high = (measure_case(case, arguments, images) for images in (few, more))
        if low is None or high is None:
            raise ValueError(f"{case} does not even fit {more} images; raise --limit-gb")
        per_image[case] = (high - low) / (more - few)
        print(f"{case:10s} {per_image[case] / 1e6:8.0f} MB an image", flush=True)
    for case in CASES:
        whole[case] = measure_case(case, arguments, arguments.images)
        told = "does not fit" if whole[case] is None else f"{whole[case] / 1e9:.2f} GB"
        print(f"{case:10s} {arguments.images} images: {told}", flush=True)
    return {
        "benchmark": "cam_memory",
        **machine.describe(machine.STEP),
        "torch": torch.__version__,
        "model": arguments.model,
        "images": arguments.images,
        "limit_bytes": int(arguments.limit_gb * 1e9),
        "bytes_per_image": {case: round(value) for case, value in per_image.items()},
        "bytes": whole,
        "textbook_over_step": round(per_image["textbook"] / per_image["step"], 3),
        "textbook_over_recompute": round(per_image["textbook"] / per_image["recompute"], 3),
    }


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["child"]:
        case, model, images, limit = sys.argv[2:]
        child(case, model, int(images), int(limit))
        return
    arguments = cli.parse(Arguments, prog="benchmarks.cam_memory")
    result = measure(arguments)
    if arguments.save:
        files.write_json(str(RESULTS / f"cam_memory_{arguments.model}_cpu.json"), result)
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
