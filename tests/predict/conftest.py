"""Photos of many kinds, packed, and a model trained and evaluated on them."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from benchmarks.tiny_world import COLOURS
from rft.evaluate import command as evaluation
from rft.loading.dataset import PackedDataset
from rft.packing.commands import folder
from tests import tiny

PER_CLASS = 30  # of which 0.6 are test images: more than one forward holds, and not a whole number
SIDES = (20, 26)


class Home(NamedTuple):
    """The locations of all parts."""

    photos: Path
    data: Path
    run: Path


def write_photo(path: Path, colour: tuple[int, ...], number: int) -> None:
    """Write photo `number` of a colour, in one of the formats of real photos."""
    rng = np.random.default_rng([number, *colour])
    pixels_HWC = np.array(colour) + rng.normal(0, 60, (*SIDES, 3))
    image = Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 1 + number % 8
    match number % 6:
        case 0:
            image.save(path.with_suffix(".jpg"), exif=exif)
        case 1:
            image.putalpha(Image.fromarray(rng.integers(0, 256, SIDES).astype(np.uint8)))
            image.save(path.with_suffix(".png"), exif=exif)
        case 2:
            image.quantize(8).save(path.with_suffix(".png"), transparency=3)
        case 3:
            image.convert("CMYK").save(path.with_suffix(".jpeg"), exif=exif)
        case 4:
            deep = (np.asarray(image.convert("L")).astype(np.uint16) << 8) + 255
            Image.fromarray(deep).save(path.with_suffix(".png"))
        case _:
            image.save(path.with_suffix(".webp"), lossless=True, exif=exif)


@pytest.fixture(scope="session")
def home(tmp_path_factory, tiny_clip) -> Home:
    """Photos, their packed sets, and a run with a temperature."""
    root = tmp_path_factory.mktemp("home")
    made = Home(root / "photos", root / "shards", root / "run")
    for name, colour in COLOURS.items():
        (made.photos / name).mkdir(parents=True)
        for number in range(PER_CLASS):
            write_photo(made.photos / name / f"photo{number:02d}", colour, number)
    names = sorted(COLOURS)
    labels = {"ids": names, "names": names, "templates": ["a {c} square"]}
    (root / "classes.json").write_text(json.dumps(labels))
    packing = (
        "--classes",
        root / "classes.json",
        "--encoding",
        "original",
        "--test-share",
        0.6,
        "--workers",
        1,
    )
    tiny.call(folder, "--source", made.photos, "--out", made.data, *packing)
    tiny.train("vanilla", made.data, tiny_clip, made.run, "--train-set", "train")
    evaluate(made, made.run, "--temperature")
    return made


def evaluate(home: Home, run: Path, *options: object) -> None:
    """Evaluate a run on the photos' test set."""
    tiny.call(evaluation, run, "--data", home.data, "--sets", "test", "--workers", 0, *options)


def images_of(home: Home) -> list[Path]:
    """The files of the packed test set, in its order."""
    keys = PackedDataset(str(home.data / "test")).index.key.astype(str)
    places = [key.split("_") for key in keys]
    return [next((home.photos / colour).glob(f"{name}.*")) for colour, name in places]
