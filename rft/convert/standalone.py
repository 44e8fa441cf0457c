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
    """Read an image as rft does: upright, on white, 16-bit grey reduced to its high byte."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode != "P" and "transparency" in image.info:  # Pillow may scale it wrongly
        raise OSError(f"{path}: one of its colours is transparent; save it with an alpha channel")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "A" not in image.mode and "transparency" not in image.info:
        return image.convert("RGB")
    rgba, white = image.convert("RGBA"), Image.new("RGB", image.size, "white")
    white.paste(rgba, mask=rgba)
    return white


@torch.no_grad()
def classify(paths: list[str]) -> tuple[list[str], torch.Tensor]:
    """Compute class probabilities; return the class names and an array (images, classes)."""
    card = json.loads((FOLDER / "card.json").read_text(encoding="utf-8"))
    loaded: Any = open_clip.create_model_and_transforms(f"local-dir:{FOLDER}")
    model, _, transform = loaded
    head = load_file(FOLDER / "head.safetensors")
    images = torch.stack([transform(read(path)) for path in paths])
    features = model.eval().encode_image(images, normalize=True)
    logits = features @ head["head.weight"].T + head["head.bias"]
    names = card["classes"] or [f"class {n}" for n in range(logits.shape[1])]
    return names, (logits / (card["temperature"] or 1)).softmax(dim=1)


if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        sys.exit("usage: python load.py IMAGE...")
    try:
        names, probabilities = classify(sys.argv[1:])
    except OSError as error:  # missing file, or not an image
        sys.exit(f"error: {error}")
    for path, row in zip(sys.argv[1:], probabilities, strict=True):
        print(f"{path}: {names[int(row.argmax())]} ({float(row.max()):.1%})")
