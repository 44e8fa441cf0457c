"""Does the CAM find the object (Table 2)? `... -m rft.evaluate.localisation RUN... --masks DIR`.

The patches that object masking would mask are compared with segmentation masks. The paper averages
over masks made during training, with one run per threshold. Here the CAM of one checkpoint is
measured for all thresholds, on unmodified images. A mask is good if its object masking rate exceeds
its image masking rate: for random masks of any rate the two are equal in expectation.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from rft import cli, dist
from rft.config import MAX_PIXELS, Cam, Device
from rft.dist import World
from rft.evaluate.checkpoints import load_checkpoints, require_classes
from rft.evaluate.coverage import Pixels
from rft.evaluate.measure_cam import measure
from rft.evaluate.measured_images import Measurable, Selection, select
from rft.loading.dataset import PackedDataset
from rft.log import ASIDE
from rft.paper import TABLE_2
from rft.progress import progress
from rft.runs import filenames
from rft.runs.folder import require_own_weights, results_path
from rft.sets import TRAIN_SET
from rft.storage import files, urls
from rft.storage.documents import BatchSize, Megapixels, Seed, Whole, document

ROWS = {
    "image masking rate": "image_masking_rate",
    "object masking rate": "object_masking_rate",
    "IoU": "iou",
}


@document(name="--")
class Arguments:
    """Measure how well the CAM's object mask covers the object (the paper's Table 2).

    Counts and rates are written to a run folder's localisation.json, or to FILE.localisation.json;
    every call measures anew. A random mask of any rate has an object masking rate equal to its
    image masking rate, in expectation. The CAM finds objects as far as its object masking rate is
    above that.
    """

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders (the selected model; the last without held-out images) or .safetensors files."""
    data: str
    """Data root: the URL that contains the packed sets."""
    masks: Path
    """Folder of object masks made by any segmenter: PNG files of one channel, 0 and one other value
    on the object. Each has the size of its image as rft shows it (own photos upright by their EXIF
    orientation, all others as stored), or of the model's centre crop. A mask has the path of its
    image (n01440764/n01440764_10026.png), or the sample's key as its name. Images without a mask
    are left out and counted."""
    set: str = TRAIN_SET
    """Packed set to measure on."""
    thresholds: Annotated[tuple[float, ...], tyro.conf.arg(metavar="T...")] = tuple(TABLE_2)
    """CAM thresholds: patches with relevance / max relevance above one are masked."""
    classes: Measurable = "restricted"
    """Images of Restricted ImageNet's dogs, cats and birds (144 of ImageNet's classes), or all."""
    samples: Whole = 0
    """Number of images to measure, drawn at random from those with a mask; 0 measures all."""
    seed: Seed = 0
    """Seed of that draw."""
    cam: Cam = "relevance"
    """The class activation map: Chefer's relevance over all layers, or GradCAM on the last one."""
    batch_size: BatchSize = 128
    """Images per forward."""
    workers: Whole = 4
    """Loader processes per rank, and threads that read masks; 0 reads in the measuring process."""
    max_pixels: Megapixels = MAX_PIXELS
    """Limit of an image, in millions of pixels; raise it if a set was packed with a higher one."""
    device: Device = "auto"


def localise(
    arguments: Arguments, packed: PackedDataset, world: World, device: torch.device
) -> None:
    """Measure every checkpoint in one pass; the main rank writes and prints the results."""
    loaded, models = load_checkpoints(arguments.checkpoints, world, device)
    selection = select(
        packed, arguments.masks, arguments.classes, arguments.samples, arguments.seed
    )
    # compared by key: nodes that see different mask folders would choose different images
    names = [packed.key(sample) for sample in selection.samples.tolist()]
    dist.require_agreement(world, "list of masks", files.sha256_json(names))
    with progress(arguments.set, "images", len(names) // world.size, ASIDE) as advance:
        found, masks_sha256 = measure(
            # a CAM needs gradients of the attention maps only
            [model.requires_grad_(False) for model in models],
            packed,
            selection,
            arguments.thresholds,
            cam=arguments.cam,
            world=world,
            device=device,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            progress=advance,
            names=[str(one.path) for one in loaded],
        )
    # object masks are the same for every model, so the first one's count is enough
    if not (found[0].object_N > 0).any():
        raise ValueError(f"all {len(names):,} masks below {arguments.masks} are empty")
    if not world.is_main:
        return
    for one, pixels in zip(loaded, found, strict=True):
        document = to_document(arguments, packed, selection, pixels, masks_sha256)
        path = results_path(one.path, filenames.LOCALISATION)
        files.write_json(str(path), {**one.record(), **document})
        architecture = one.saved.architecture
        patch = architecture.vision_cfg.get("patch_size")
        # the paper's Table 2 is about ViT-B/32 alone
        is_b32 = (patch, architecture.image_size) == (32, 224)
        title = f"{one.path}{one.state_of_run}"
        cli.say(format_table(title, document, beside_paper=is_b32))


def to_document(
    arguments: Arguments,
    packed: PackedDataset,
    selection: Selection,
    measured: Pixels,
    masks_sha256: str,
) -> dict[str, Any]:
    """Make a JSON document of one checkpoint's counts and rates."""
    pixels = measured.with_object()
    pooled = pixels.pooled()
    rates = zip(arguments.thresholds, pixels.mean_rates(), pooled.mean_rates(), strict=True)
    counts = {"masked": pooled.masked_TN, "both": pooled.both_TN, "either": pooled.either}
    images, seen = len(measured.object_N), len(pixels.object_N)
    return {
        "schema": 1,
        "set": arguments.set,
        "manifest_sha256": packed.manifest.sha256,
        "masks": str(arguments.masks),
        "masks_sha256": masks_sha256,  # over the mask files of the measured images, in their order
        "classes": arguments.classes,
        "cam": arguments.cam,
        "samples": arguments.samples,
        "seed": arguments.seed,
        "images": {
            "measured": seen,
            "empty_mask": images - seen,
            "without_mask": selection.missing,
        },
        "pixels": {"image": pooled.image, "object": int(pooled.object_N.item())},
        "thresholds": [
            {
                "threshold": threshold,
                "pixels": {name: int(count_T1[place, 0]) for name, count_T1 in counts.items()},
                "mean": mean._asdict(),
                "pooled": of_all._asdict(),
            }
            for place, (threshold, mean, of_all) in enumerate(rates)
        ],
    }


def format_table(title: str, document: dict[str, Any], *, beside_paper: bool) -> str:
    """Format the rates like Table 2, with the paper's numbers beside those of its own model."""
    images, entries = document["images"], document["thresholds"]
    lines = [
        f"{title}: {document['set']}, mean over {images['measured']:,} images "
        f"({images['empty_mask']:,} more have an empty mask, {images['without_mask']:,} no mask)",
        _line("threshold", [f"{entry['threshold']:g}" for entry in entries]),
    ]
    for title, name in ROWS.items():
        lines.append(_line(title, [f"{entry['mean'][name]:.3f}" for entry in entries]))
        if beside_paper and document["classes"] == "restricted":
            paper = [TABLE_2.get(entry["threshold"]) for entry in entries]
            cells = [f"{getattr(rates, name):.2f}" if rates else "-" for rates in paper]
            lines.append(_line("  the paper's", cells))
    return "\n".join(lines)


def _line(title: str, cells: Sequence[str]) -> str:
    return f"{title:<20}" + "".join(f"{cell:>8}" for cell in cells)


def check(arguments: Arguments) -> None:
    """Check the options that need no file to be read.

    Raises:
        ValueError: naming the option.
    """
    if not arguments.checkpoints:
        raise ValueError("name at least one run folder or .safetensors file to measure")
    if not arguments.thresholds or len(set(arguments.thresholds)) < len(arguments.thresholds):
        raise ValueError("--thresholds needs at least one value, without duplicates")
    if bad := [value for value in arguments.thresholds if not 0 <= value <= 1]:
        raise ValueError(f"--thresholds has {bad[0]:g}; it must be from 0 to 1")


def main() -> None:
    """Measure the checkpoints of the command line."""
    arguments = cli.parse(Arguments, prog="rft.evaluate.localisation")
    arguments = replace(arguments, set=urls.set_name(arguments.set, "--set"))
    check(arguments)
    url = files.join(arguments.data, arguments.set)
    packed = PackedDataset(url, max_pixels=arguments.max_pixels, option="--set")
    require_classes(arguments.checkpoints, {arguments.set: packed})
    for path in arguments.checkpoints:
        require_own_weights(path)
    world = dist.world_from_env()
    device = dist.pick_device(arguments.device, world)
    with dist.process_group(world, device) as world:
        dist.require_agreement(world, "packed set", packed.manifest.sha256)
        localise(arguments, packed, world, device)


if __name__ == "__main__":
    cli.run(main, ranks=True)
