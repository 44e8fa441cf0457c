"""A tiny world (coloured squares in the official layouts, a random CLIP) and its processes."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rft.packing.pack import Options, pack
from rft.shards.label_space import LabelSpace

SIZE = 16
COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200), "grey": (90,) * 3}
LABELS = LabelSpace(
    ids=tuple(f"n0000000{n}" for n in range(len(COLOURS))),
    names=tuple(COLOURS),
    templates=("a {c} square", "{c}"),
)
WORDS = ("", "<start>", "a", "square", *COLOURS, "<end>")
# odd sizes on purpose: not divisible by two or three
COUNTS = {"imagenet-train": 19, "imagenet-val": 7, "imagenet-r": 5, "imagenet-a": 3}


def write_images(root: Path, dataset: str, per_class: int) -> None:
    """Write the images of one set in its official layout."""
    folder = {"imagenet-train": "imagenet/train", "imagenet-val": "imagenet/val"}
    rng = np.random.default_rng(len(dataset))
    for wnid, colour in zip(LABELS.ids, COLOURS.values(), strict=True):
        classes = root / folder.get(dataset, dataset) / wnid
        classes.mkdir(parents=True)
        for n in range(per_class):
            pixels = np.array(colour) + rng.normal(0, 60, (SIZE, SIZE, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(classes / f"{wnid}_{n}.png")


def shards(root: Path) -> Path:
    """Return the data root of the world of `write_data`."""
    return root / "shards"


def write_data(root: Path) -> Path:
    """Write images and shards of four small sets; return the data root."""
    for dataset, per_class in COUNTS.items():
        write_images(root / "images", dataset, per_class)
        options = Options(encoding="pixels", size=SIZE, shard_mb=0.02, workers=1)
        pack(dataset, str(root / "images"), str(shards(root)), LABELS, options)
    return shards(root)


def clip_name(folder: Path) -> str:
    """Return the --model.clip of the CLIP of `write_clip`."""
    return f"local-dir:{folder}"


def write_clip(folder: Path) -> str:
    """Write a random CLIP in open_clip's folder format; return its name for --model.clip."""
    # imported here, because short processes of tests import this module for other things
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "embed_dim": 16,
        "vision_cfg": {
            "layers": 2,
            "width": 24,
            "head_width": 8,
            "patch_size": 4,
            "image_size": SIZE,
        },
        "text_cfg": {
            "context_length": 8,
            "vocab_size": len(WORDS),
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)  # noqa: TID251
        model = open_clip.model.CLIP(**config)
    document = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return clip_name(folder)


def environment(**extra: str) -> dict[str, str]:
    """Copy this process's environment with one thread, as torchrun sets it for several ranks."""
    root = str(Path(__file__).parents[1])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, **extra}


def children(pid: int) -> list[int]:
    """List all child processes of a process, recursively."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            listed = task.read_text().split()
        except OSError:  # ended between listing and reading
            continue
        for child in map(int, listed):
            found += [child, *children(child)]
    return found


def kill(pid: int) -> None:
    """Kill a process if it still exists."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
