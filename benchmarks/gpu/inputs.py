"""Inputs of the parts: synthetic shards, and random weights of open_clip's models.

rft's own packer writes the shards from image files, so the trainer reads the same format as a
user's. Everything stays in the work folder, for later parts and the next call.
"""

import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
from PIL import Image
from safetensors.torch import save_file

from rft.clip.weights import HUB_CONFIG, HUB_WEIGHTS
from rft.packing import pack
from rft.rng import numpy_generator
from rft.shards.folder import MANIFEST
from rft.shards.images import Kind
from rft.shards.label_space import LabelSpace
from rft.storage import files

REHEARSAL = "rft-rehearsal"  # a vision transformer with some thousand weights
DISTINCT = 512  # images that are really generated; the files are links to them
SET = "imagenet-train"

open_clip.add_model_config(Path(__file__).with_name(f"{REHEARSAL}.json"))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All sizes."""

    device: str
    models: tuple[str, ...]
    """open_clip names, the most informative last."""
    large: str
    """A model whose batch is halved until it fits."""
    batch_size: int
    classes: int
    rounds: int
    """Timed repetitions of each step."""
    steps: int
    """Optimizer steps of the complete trainer, one epoch."""
    workers: int
    """Loader processes of the trainer."""
    work: Path
    """Folder for shards, weights and runs."""

    @property
    def images(self) -> int:
        """Images of the synthetic set: one epoch of the trainer."""
        return self.batch_size * self.steps


def labels(classes: int) -> LabelSpace:
    """Take the first classes of ImageNet, with one prompt each."""
    whole = LabelSpace.imagenet()
    return dataclasses.replace(
        whole, ids=whole.ids[:classes], names=whole.names[:classes], templates=whole.templates[:1]
    )


def image_size(model: str) -> int:
    """Look up the side of a model's input in pixels."""
    config = open_clip.get_model_config(model)
    assert config is not None, model
    return config["vision_cfg"]["image_size"]


def draw(number: int, size: int) -> bytes:
    """Generate a JPEG that compresses like a photograph: soft shapes, some grain.

    About 17 KB at 224 pixels, as much as a photograph's square of that size.
    """
    rng = numpy_generator("gpu benchmark", number)
    shapes = Image.fromarray(rng.integers(256, size=(7, 7, 3), dtype=np.uint8))
    smooth = np.asarray(shapes.resize((size, size), Image.Resampling.BICUBIC), np.float32)
    pixels = (smooth + rng.normal(0, 6, (size, size, 1))).clip(0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def write_images(settings: Settings, size: int) -> Path:
    """Write the image files in the layout of ImageNet's training set; return their folder."""
    name = f"images-{settings.images}-{settings.classes}-{size}"
    folder = settings.work / name
    if folder.exists():
        return folder
    part = settings.work / f"{name}.part"  # a folder without this ending is complete
    ids = labels(settings.classes).ids
    for wnid in ids:
        (part / "train" / wnid).mkdir(parents=True, exist_ok=True)
    for number in range(settings.images):
        wnid = ids[number % len(ids)]
        path = part / "train" / wnid / f"{wnid}_{number}.JPEG"
        first = number % DISTINCT
        if path.exists():
            continue
        if first == number:
            files.write_bytes(str(path), draw(number, size))
            continue
        origin = part / "train" / ids[first % len(ids)] / f"{ids[first % len(ids)]}_{first}.JPEG"
        try:
            path.hardlink_to(origin)
        except OSError:  # a file system without links
            files.write_bytes(str(path), origin.read_bytes())
    part.rename(folder)
    return folder


def write_shards(settings: Settings, encoding: Kind, size: int) -> Path:
    """Pack the images; return the data root."""
    root = settings.work / f"{encoding}-{settings.images}-{settings.classes}-{size}"
    if not (root / SET / MANIFEST).exists():
        pack.pack(
            SET,
            str(write_images(settings, size)),
            str(root),
            labels(settings.classes),
            pack.Options(encoding=encoding, size=size),
            allowed_count=settings.images,
        )
    return root


def write_clip(settings: Settings, model: str) -> str:
    """Write an open_clip model with random weights to a folder; return its --model.clip."""
    folder = settings.work / f"clip-{model}"
    if not (folder / HUB_CONFIG).exists():
        folder.mkdir(parents=True, exist_ok=True)
        state = open_clip.create_model(model, pretrained=None).state_dict()
        save_file({name: value.contiguous() for name, value in state.items()}, folder / HUB_WEIGHTS)
        document = {
            "model_cfg": open_clip.get_model_config(model),
            "preprocess_cfg": {
                "mean": open_clip.OPENAI_DATASET_MEAN,
                "std": open_clip.OPENAI_DATASET_STD,
            },
        }
        # last, because a folder without it is rewritten
        files.write_json(str(folder / HUB_CONFIG), document)
    return f"local-dir:{folder.resolve()}"
