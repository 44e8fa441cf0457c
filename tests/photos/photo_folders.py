"""Small photo folders as users have them: coloured squares of classes named by 16 words."""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 20
# of the miniature's vocabulary
WORDS = (
    ("red", "green", "blue", "purple"),
    ("bricks", "checks", "dots", "waves", "stripes", "ripples"),
)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAMES = [" ".join(words) for words in product(*WORDS, (*NUMBERS, "ring", "heart", "star"))]


def picture(label: int, number: int, kind: str = "RGB") -> Image.Image:
    """A noisy square whose colour follows from the class."""
    rng = np.random.default_rng([label, number])
    colour = np.array([(37 * label) % 256, (91 * label + 60) % 256, (53 * label + 120) % 256])
    pixels = (colour + rng.normal(0, 40, (SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)
    if kind == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(pixels)


def write(
    root: Path,
    counts: Sequence[int],
    folders: Sequence[str] = (),
    *,
    below: str = "",
    first: int = 0,
) -> Path:
    """Write so many photos per class, and beside the folder the names of the classes."""
    ids = list(folders) or [f"c{label:03d}" for label in range(len(counts))]
    for label, count in enumerate(counts):
        folder = root / ids[label] / below
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            picture(label, number).save(folder / f"{number}.png")
    return root


def name_classes(path: Path, ids: Sequence[str]) -> Path:
    """Write the document for --classes."""
    names = NAMES[: len(ids)]
    path.write_text(json.dumps({"ids": list(ids), "names": names, "templates": ["a {c}."]}))
    return path
