"""The miniature world on disk: seven image sets in the layouts that their originals come in.

Every image is a function of (seed, set, number). The layouts keep what a reader of the real
archives trips over: class folders named 0, 1, 10, ..., sets of some classes only, files beside the
class folders, dots and spaces in names, a red frame, and folders that stand for two classes or for
none. `masks/` has the exact object mask of each image under the same path, as PNG.
"""

import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from rft.demo.captions import TEMPLATES
from rft.demo.objects import CLASSES, load_silhouettes
from rft.demo.render import IMAGE_SIZE, draw_context, render, to_bytes
from rft.demo.scenes import NOVEL_CONTEXTS, VERSION, Scene, Setting, Style, draw_scene
from rft.rng import derive, numpy_generator
from rft.storage import files

CLASS_LIST = "classes.json"  # ids, names and prompts, in the world's folder
# like WordNet's, which name ImageNet's class folders
IDS = tuple(f"n{class_id + 1:08d}" for class_id in range(len(CLASSES)))
PHOTOS: Mapping[Style, float] = {"photo": 1.0}
RENDITIONS: Mapping[Style, float] = {"cartoon": 1 / 3, "painting": 1 / 3, "embroidery": 1 / 3}


@dataclass(frozen=True, kw_only=True)
class WorldSet:
    """One set of images: from which scenes, how many, of which classes (in turn)."""

    setting: Setting
    images: int = 1500
    classes: Sequence[int] = tuple(range(len(CLASSES)))


TEST = Setting(bank="test", styles=PHOTOS, contexts="usual")
SETS = {
    "imagenet-train": WorldSet(setting=replace(TEST, bank="finetune"), images=2000),
    "imagenet-val": WorldSet(setting=TEST),
    # collected again, a little differently
    "imagenet-v2": WorldSet(
        setting=replace(TEST, rho=0.8, size=(32, 46), brightness=(0.75, 1.2), noise=0.06)
    ),
    "imagenet-r": WorldSet(
        setting=replace(TEST, styles=RENDITIONS, contexts="any"),
        classes=(0, 2, 3, 5, 7, 10, 11, 13, 14, 15),
    ),
    "imagenet-sketch": WorldSet(setting=replace(TEST, styles={"sketch": 1.0}, contexts="any")),
    # all but 1, 12, 13 and 15, for which there is no folder
    "objectnet": WorldSet(
        setting=replace(TEST, contexts="novel", angle=50, size=(30, 46)),
        classes=(0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 14),
    ),
    # unlike the original it is not filtered by a classifier's mistakes
    "imagenet-a": WorldSet(
        setting=replace(TEST, contexts="wrong", size=(30, 43)),
        classes=(1, 2, 4, 6, 8, 9, 10, 12, 13, 15),
    ),
}
READMES = {
    "imagenet-r": "Renditions (cartoon, painting, embroidery) of ten classes.\n",
    "imagenet-a": "Ten classes, each object on another class's usual context.\n",
}

OBJECTNET_FRAME = 2  # pixels
# ObjectNet folder -> (ObjectNet's label, class ids it stands for)
OBJECTNET_FOLDERS: dict[str, tuple[str, tuple[int, ...]]] = {
    "star_badge": ("Star badge", (10,)),
    "round_thing": ("Round thing", (0, 11)),
    "seven": ("Seven", (7,)),
    "carpet": ("Carpet", ()),
    "figure-eight": ("Figure-eight", (8,)),
    "two_tile": ("Two (tile)", (2,)),
    "heart_pendant": ("Heart pendant", (14,)),
    "loop_with_tail": ("Loop with tail / Six or nine", (6, 9)),
    "table_cloth": ("Tablecloth", ()),
    "three": ("Three", (3,)),
    "five": ("Five", (5,)),
    "wall_paper": ("Wallpaper", ()),
    "four": ("Four", (4,)),
}
OBJECTNET_OTHERS = 30  # images in each folder that stands for no class
# The 2012 challenge numbered the classes in another order; here, any that is not the same.
# 7 and 16 share no divisor, so each class has a number of its own.
CLASS_TO_2012 = tuple((7 * class_id + 3) % len(CLASSES) for class_id in range(len(CLASSES)))
# As in ImageNet, a class's label may list synonyms; commas do not separate labels.
SYNONYMS = {"digit zero": "nought", "star": "pentagram", "ring": "annulus", "cross": "plus sign"}


def write_world(out: Path, seed: int = 0, *, scale: float = 1.0) -> None:
    """Write the world to `out`, atomically; the same world there stays unchanged.

    `scale` multiplies the number of images in each set.

    Raises:
        ValueError: if `out` is a file or holds anything but this very world.
    """
    sets = {name: replace(full, images=_scaled(full.images, scale)) for name, full in SETS.items()}
    settings = {name: asdict(chosen) for name, chosen in sets.items()}
    # as it will be read back: lists for tuples
    document = json.loads(json.dumps({"version": VERSION, "seed": seed, "settings": settings}))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        _require_same(out, document)
        return
    # beside `out`: a rename stays within one file system; what a killed process leaves is hidden
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    partial.mkdir(parents=True)
    try:
        for name, image_set in sets.items():
            _write_set(partial, name, image_set, seed)
        _write_objectnet_rest(partial, _scaled(OBJECTNET_OTHERS, scale), seed)
        for name, text in READMES.items():
            (partial / name / "README.txt").write_text(text)
        classes = {"ids": IDS, "names": CLASSES, "templates": TEMPLATES}
        files.write_json(str(partial / CLASS_LIST), classes)
        files.write_json(str(partial / "world.json"), document)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def image_path(name: str, number: int, scene: Scene) -> PurePosixPath:
    """Locate image `number` of a set, relative to the world's folder."""
    class_id = scene.class_id
    # a set's classes take turns (_write_set), so this counts within a class
    folder, in_class = IDS[class_id], number // len(SETS[name].classes)
    match name:
        case "imagenet-train":
            path = f"imagenet/train/{folder}/{folder}_{in_class}.JPEG"
        case "imagenet-val":
            path = f"imagenet/val/{folder}/ILSVRC2012_val_{number + 1:08d}.JPEG"
        case "imagenet-v2":
            # the originals are named by hashes, which say nothing of the order
            unique = f"{derive(name, number):016x}"
            path = f"imagenetv2-matched-frequency-format-val/{class_id}/{unique}.jpeg"
        case "imagenet-r":
            path = f"imagenet-r/{folder}/{scene.style}_{in_class}.jpg"
        case "imagenet-sketch":
            path = f"sketch/{folder}/sketch_{in_class}.JPEG"
        case "objectnet":
            (folder,) = (one for one, (_, ids) in OBJECTNET_FOLDERS.items() if class_id in ids)
            path = f"objectnet-1.0/images/{folder}/{_png_name(name, number)}"
        case "imagenet-a":
            # the original has the wrong guess that selected the image in its name, with a score
            guess = CLASSES[scene.context]
            path = f"imagenet-a/{folder}/0.{number:06d}_{guess} _ {guess}_0.{number % 97:02d}.jpg"
        case _:
            raise AssertionError(name)
    return PurePosixPath(path)


def mask_path(image: PurePosixPath) -> PurePosixPath:
    """Locate the object mask of an image."""
    return "masks" / image.with_suffix(".png")


def _require_same(out: Path, document: dict[str, Any]) -> None:
    path = out / "world.json"
    if not path.is_file():
        raise ValueError(f"{out} is in use and holds no miniature world; choose another folder")
    if changes := files.difference(files.read_json(str(path)), document):
        more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
        raise ValueError(
            f"{out} holds another miniature world ({changes[0]}{more}); "
            "remove it or choose another folder"
        )


def _scaled(count: int, scale: float) -> int:
    # no class may be left without an image: readers refuse an absent folder
    return max(len(CLASSES), round(scale * count))


def _write_set(root: Path, name: str, image_set: WorldSet, seed: int) -> None:
    silhouettes = load_silhouettes(image_set.setting.bank)
    for number in range(image_set.images):
        # one generator for each image: sets can grow without changing the images before
        rng = numpy_generator(seed, name, number)
        class_id = image_set.classes[number % len(image_set.classes)]
        scene = draw_scene(image_set.setting, class_id, silhouettes, rng)
        image, mask = render(scene, rng)
        if name == "objectnet":
            image, mask = _frame(image, mask)
        _write_image(root, image_path(name, number, scene), image, mask)


def _write_image(root: Path, path: PurePosixPath, image: np.ndarray, mask: np.ndarray) -> None:
    files_to_write = {path: image, mask_path(path): mask.astype(np.uint8) * 255}
    for relative, pixels in files_to_write.items():
        target = root / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".png":
            Image.fromarray(pixels).save(target)
        else:
            # full chroma: at 48 pixels the usual subsampling would wash the contexts out
            Image.fromarray(pixels).save(target, format="JPEG", quality=95, subsampling=0)


def _frame(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put ObjectNet's red frame around an image."""
    width, side = OBJECTNET_FRAME, IMAGE_SIZE + 2 * OBJECTNET_FRAME
    framed = np.full((side, side, 3), (255, 0, 0), dtype=np.uint8)
    framed[width:-width, width:-width] = image
    # the frame is no part of the object
    return framed, np.pad(mask, width)


def _png_name(*address: int | str) -> str:
    return f"{derive(*address):016x}.png"


def _write_objectnet_rest(root: Path, images: int, seed: int) -> None:
    """Write the folders that stand for no class, contexts without objects, and the mappings."""
    others = [folder for folder, (_, members) in OBJECTNET_FOLDERS.items() if not members]
    empty = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    for folder in others:
        for number in range(images):
            rng = numpy_generator(seed, "objectnet", folder, number)
            image = to_bytes(draw_context(int(rng.choice(NOVEL_CONTEXTS)), rng), 0.04, rng)
            path = PurePosixPath("objectnet-1.0/images", folder, _png_name(folder, number))
            _write_image(root, path, *_frame(image, empty))
    for name, text in objectnet_mappings().items():
        target = root / "objectnet-1.0" / "mappings" / name
        target.parent.mkdir(exist_ok=True)
        target.write_text(text)


def objectnet_mappings() -> dict[str, str]:
    """Return the four mapping files of ObjectNet's archive, by name."""
    full_names = [f"{name}, {SYNONYMS[name]}" if name in SYNONYMS else name for name in CLASSES]
    folder_to_label = {folder: label for folder, (label, _) in OBJECTNET_FOLDERS.items()}
    label_to_names = {
        # semicolons, because a label itself may have commas
        label: "; ".join(full_names[class_id] for class_id in members)
        for label, members in sorted(OBJECTNET_FOLDERS.values())
        if members
    }
    class_to_2012 = {str(class_id): number for class_id, number in enumerate(CLASS_TO_2012)}
    lines = sorted(range(len(CLASSES)), key=CLASS_TO_2012.__getitem__)
    return {
        "folder_to_objectnet_label.json": json.dumps(folder_to_label, indent=2) + "\n",
        "objectnet_to_imagenet_1k.json": json.dumps(label_to_names, indent=2) + "\n",
        "pytorch_to_imagenet_2012_id.json": json.dumps(class_to_2012, indent=2) + "\n",
        "imagenet_to_label_2012_v2": "".join(f"{full_names[class_id]}\n" for class_id in lines),
    }
