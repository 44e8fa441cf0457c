"""Renders predictions as one self-contained page: the square the model saw, and bars.

Shapes: B images, G patches along a side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rft.predict.model import Model, Prediction
from rft.report import colors
from rft.report.gallery import heat_map
from rft.report.templates import data_url, environment
from rft.report.thumbnails import thumbnail

START = b"<!doctype html>\n<!-- rft predict -->\n"
"""The page's first bytes, which distinguish it from other files."""
SHOWN = 1000  # images on a page, some 10 KB each
SIDE = 192  # side of a picture in pixels


@dataclass(frozen=True)
class Shown:
    """One image on the page."""

    path: str
    prediction: Prediction
    picture: str
    """Data URL of the square that the model saw, WebP."""
    overlay: str = ""
    """The same under the relevance for the best class; empty without --cam."""


def shown(
    paths: Sequence[str],
    predictions: Sequence[Prediction],
    images_BCHW: np.ndarray,
    relevance_BGG: np.ndarray | None,
) -> list[Shown]:
    """Draw some images, uint8, for the page, with their relevance if given."""
    images_BHWC = images_BCHW.transpose(0, 2, 3, 1)
    pictures = [_picture(image_HWC) for image_HWC in images_BHWC]
    overlays = [""] * len(pictures)
    if relevance_BGG is not None:
        relevance_BP = relevance_BGG.reshape(len(relevance_BGG), -1)
        overlays = [_picture(image_HWC) for image_HWC in heat_map(images_BHWC, relevance_BP)]
    return [Shown(*one) for one in zip(paths, predictions, pictures, overlays, strict=True)]


def _picture(image_HWC: np.ndarray) -> str:
    return data_url("webp", thumbnail(Image.fromarray(image_HWC), side=SIDE))


def render(model: Model, images: Sequence[Shown], total: int, refused: Sequence[str]) -> bytes:
    """Render the page: `images` of `total`, and the errors of those that could not be read."""
    template = environment([Path(__file__).parent]).get_template("page_of_images.html")
    text = template.render(model=model, images=images, total=total, refused=refused, grounds=colors)
    return START + text.encode()
