"""Draws photos of the miniature world, one folder per class, to try `rft photos`."""

from pathlib import Path

from PIL import Image

from rft.demo.captions import TEMPLATES
from rft.demo.objects import CLASSES, load_silhouettes
from rft.demo.render import render
from rft.demo.scenes import draw_scene
from rft.demo.world import SETS
from rft.rng import numpy_generator
from rft.storage import files

PER_CLASS = 19  # of 16 classes


def write_example(source: Path, seed: int = 0) -> None:
    """Draw the photos into folders below `source`, and `source`.json, which names the classes.

    Photos of an earlier call are kept.
    """
    setting = SETS["imagenet-train"].setting
    silhouettes = load_silhouettes(setting.bank)
    folders = [f"{label:02d}" for label in range(len(CLASSES))]
    for label, folder in enumerate(folders):
        (source / folder).mkdir(parents=True, exist_ok=True)
        for number in range(PER_CLASS):
            path = source / folder / f"{number:02d}.png"
            if path.exists():
                continue
            # one generator per photo, so that it does not depend on which others exist
            rng = numpy_generator(seed, "photos", label * PER_CLASS + number)
            image, _ = render(draw_scene(setting, label, silhouettes, rng), rng)
            with files.publish(str(path)) as kept:
                Image.fromarray(image).save(kept, format="PNG")
    names = {"ids": folders, "names": list(CLASSES), "templates": list(TEMPLATES)}
    files.write_json(str(source.with_name(f"{source.name}.json")), names)
