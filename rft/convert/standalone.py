"""Classify images with this folder: `python load.py IMAGE...`. Needs only open_clip_torch."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

FOLDER = Path(__file__).parent


def read(path: str) -> Image.Image:
    """Read pixels as rft does: upright, on white, 16-bit grey reduced to its high byte."""
    try:
        opened = Image.open(path)
        image = ImageOps.exif_transpose(opened)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if image.mode != "P" and "transparency" in image.info:  # Pillow may scale it wrongly
        raise OSError(f"{path}: one of its colours is transparent; save it with an alpha channel")
    if image.mode == "F" or (image.mode == "I" and opened.format != "PNG"):
        raise OSError(f"{path}: unsupported pixel mode {image.mode}; save it with 8 bits")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "A" not in image.mode and "transparency" not in image.info:
        return image.convert("RGB")
    rgba, white = image.convert("RGBA"), Image.new("RGB", image.size, "white")
    white.paste(rgba, mask=rgba)
    return white


def described(rows: int) -> tuple[list[str], float]:
    """Read the names of the head's rows and the temperature from the card; both may be edited."""
    path = FOLDER / "card.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    names, temperature = card.get("classes"), card.get("temperature")
    if names is None:
        names = [f"class {n}" for n in range(rows)]
    if not isinstance(names, list) or len(names) != rows:
        raise ValueError(f"{path}: classes must be null or a list of {rows} names")
    temperature = 1 if temperature is None else temperature
    if not isinstance(temperature, int | float) or not 0 < temperature < float("inf"):
        raise ValueError(f"{path}: temperature is {temperature!r}; it must be null or above 0")
    return names, temperature


@torch.no_grad()
def classify(paths: list[str]) -> tuple[list[str], torch.Tensor]:
    """Compute class probabilities; return the class names and an array (images, classes)."""
    head = load_file(FOLDER / "head.safetensors")
    names, temperature = described(len(head["head.weight"]))
    loaded: Any = open_clip.create_model_and_transforms(f"local-dir:{FOLDER}")
    model, _, transform = loaded
    images = torch.stack([transform(read(path)) for path in paths])
    features = model.eval().encode_image(images, normalize=True)
    logits = features @ head["head.weight"].T + head["head.bias"]
    return names, (logits / temperature).softmax(dim=1)


if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        sys.exit("usage: python load.py IMAGE...")
    try:
        names, probabilities = classify(sys.argv[1:])
    except (OSError, ValueError) as error:  # a missing file, not an image, or a wrong card
        sys.exit(f"error: {error}")
    for path, row in zip(sys.argv[1:], probabilities, strict=True):
        print(f"{path}: {names[int(row.argmax())]} ({float(row.max()):.1%})")
