"""Does the CAM find the object (Table 2)? `... -m rft.evaluate.localisation RUN... --masks DIR`.

The patches that object masking would mask are held against segmentation masks. The paper averages
over masks made while training, one run for each threshold; here one checkpoint's CAM is measured,
for all thresholds, on the images as they are. What a mask is worth is told by its object masking
rate beside its image masking rate: for random masks of any rate the two are equal in expectation.

Batches are the same for any number of ranks, and the images' integers are gathered before anything
is divided, so that ranks change no digit of the result.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from torch import Tensor

from rft import cli, dist, rng
from rft.classes import compare
from rft.clip.classifier import Classifier, build_classifier
from rft.clip.vit import AttentionTap
from rft.config import MAX_PIXELS, Cam, Device
from rft.dist import World
from rft.evaluate.accuracy import is_finite
from rft.evaluate.checkpoints import Loaded, load_checkpoints, require_classes
from rft.evaluate.count import require_finite
from rft.evaluate.object_masks import SUFFIX, ObjectMask, find_masks, read_mask
from rft.evaluate.overlap import Pixels, count_masked, count_object, mean_rates, pooled_rates
from rft.loading.batches import EvaluationBatches
from rft.loading.dataset import Batch, PackedDataset
from rft.loading.read import read_batches
from rft.method import masking, relevance
from rft.paper import TABLE_2
from rft.runs import filenames
from rft.runs.folder import checkpoint_path, require_own_weights, unfinished
from rft.sets import TRAIN_SET
from rft.shards.label_space import LabelSpace
from rft.storage import files, urls
from rft.storage.documents import BatchSize, Megapixels, Seed, Whole, document

Measurable = Literal["restricted", "all"]

# Restricted ImageNet's dogs, cats and birds among ImageNet's 1000 classes (appendix A.2)
RESTRICTED = (*range(151, 269), *range(281, 286), *range(80, 101))
ROWS = {
    "image masking rate": "image_masking_rate",
    "object masking rate": "object_masking_rate",
    "IoU": "iou",
}


@document(name="--")
class Arguments:
    """Measure how well the CAM's object mask covers the object (the paper's Table 2).

    Counts and rates go to a run folder's localisation.json, or to FILE.localisation.json; each call
    measures again. A random mask of any rate has an object masking rate equal to its image masking
    rate, in expectation: the CAM finds objects as far as its object masking rate is above that.
    """

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders (the selected model; the last without held-out images) or .safetensors files."""
    data: str
    """Data root: the URL under which the tools wrote the packed sets."""
    masks: Path
    """Folder of object masks made by any segmenter: PNG files of one channel, 0 and one other value
    on the object, each in the size of its image as rft shows it: own photos upright by their EXIF
    orientation, all others as stored (or of the model's centre crop).
    A mask is called and placed as its image is (n01440764/n01440764_10026.png) or by the sample's
    key alone. Images without a mask are left out and counted."""
    set: str = TRAIN_SET
    """Packed set to measure on."""
    thresholds: Annotated[tuple[float, ...], tyro.conf.arg(metavar="T...")] = tuple(TABLE_2)
    """CAM thresholds: patches with relevance / max relevance above one are masked."""
    classes: Measurable = "restricted"
    """Images of Restricted ImageNet's dogs, cats and birds (144 of ImageNet's classes), or all."""
    samples: Whole = 0
    """Measure only so many images, chosen by chance among those that have a mask; 0 takes all."""
    seed: Seed = 0
    """Seed of that choice."""
    cam: Cam = "relevance"
    """The class activation map: Chefer's relevance over all layers, or GradCAM on the last one."""
    batch_size: BatchSize = 128
    """Images in one forward."""
    workers: Whole = 4
    """Loader processes of each rank, and its threads that read masks; 0 reads in this one."""
    max_pixels: Megapixels = MAX_PIXELS
    """Millions of pixels that an image may have; raise it if a set was packed so."""
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The samples to measure, in the order of the set, and their masks."""

    samples: np.ndarray
    paths: dict[int, Path]
    """Sample number -> mask."""
    missing: int
    """Images of the chosen classes that have no mask."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was counted of one checkpoint, and which masks it was."""

    pixels: Pixels
    masks_sha256: str
    bad: int
    """Images whose map is not finite."""


def select(
    packed: PackedDataset, masks: Path, classes: Measurable, samples: int, seed: int
) -> Selection:
    """Choose the images to measure.

    The choice by chance goes over the sorted keys, so it is the same however the set was packed.

    Raises:
        ValueError: if the set has other classes than ImageNet's, no image has a mask, or fewer have
            one than are asked for.
    """
    candidates = np.arange(len(packed))
    if classes == "restricted":
        require_imagenet(packed)
        candidates = candidates[np.isin(packed.index.label, RESTRICTED)]
    if len(candidates) == 0:
        raise ValueError(f"{packed.url} holds no image of the {classes} classes")
    sample_of = {packed.key(sample): sample for sample in candidates.tolist()}
    keys = [packed.key(sample) for sample in candidates.tolist()]
    found = find_masks(masks, keys)
    if not found:
        raise ValueError(
            f"no mask below {masks} belongs to any of the {len(keys):,} images; the first image's "
            f"would be {masks}/{keys[0]}{SUFFIX}, or lie there under the image's own path"
        )
    if samples > len(found):
        raise ValueError(
            f"--samples asks for {samples:,} images, only {len(found):,} of the "
            f"{len(keys):,} have a mask below {masks}"
        )
    chosen = sorted(found)
    if samples:
        order = rng.numpy_generator(seed, "localisation").permutation(len(chosen))
        chosen = [chosen[place] for place in order[:samples]]
    paths = {sample_of[key]: found[key] for key in chosen}
    return Selection(samples=np.array(sorted(paths)), paths=paths, missing=len(keys) - len(found))


def require_imagenet(packed: PackedDataset) -> None:
    """Check that a set has ImageNet's classes: RESTRICTED counts their places.

    Raises:
        ValueError: naming the first class that is another one.
    """
    imagenet = LabelSpace.imagenet().classes
    try:
        warnings = compare(packed.manifest.label_space, packed.url, imagenet, "ImageNet-1k")
    except ValueError as error:
        raise ValueError(
            f"--classes restricted names some of ImageNet's classes, but {error}; use --classes all"
        ) from error
    for warning in warnings:
        cli.warn(warning)


def label_map(model: Classifier, images_BCHW: Tensor, labels_B: Tensor, cam: Cam) -> Tensor:
    """Return each patch's relevance for its image's label, divided by the largest, (B, P).

    An image without finite logits has no relevance: NaN everywhere.

    Here, and nowhere else in this module, a CAM is made; it is the training step's.
    """
    taps: list[AttentionTap] = []
    # the weights are frozen, so the graph starts at the pixels
    patches_BPV = model.patches(images_BCHW).requires_grad_()
    logits_BK = model.logits(model.features(patches_BPV, taps=taps))
    kind = relevance.label_relevance if cam == "relevance" else relevance.grad_cam
    relevance_BP = relevance.normalise(kind(logits_BK, labels_B, taps)).detach()
    return relevance_BP.where(is_finite(logits_BK.detach())[:, None], torch.nan)


def measure(
    models: Sequence[Classifier],
    packed: PackedDataset,
    selection: Selection,
    thresholds: Sequence[float],
    *,
    cam: Cam,
    world: World,
    device: torch.device,
    batch_size: int,
    workers: int,
    progress: Callable[[int], None] = lambda _: None,
    names: Sequence[str] = (),
) -> list[Measured]:
    """Return what the masks of each model cover, image by image, on every rank.

    Args:
        models: classifiers of one image size, frozen, on `device`.
        packed: the set that the samples are of.
        selection: samples and masks.
        thresholds: CAM thresholds.
        cam: which map.
        world: the ranks that share the work.
        device: where the models are.
        batch_size: images in one forward.
        workers: loader processes of each rank; 0 reads in this one.
        progress: called with the number of images each time this rank has done some.
        names: what to call each model in a message.

    Raises:
        ValueError: if an image or a mask is damaged, a mask has the wrong size, or a model has
            logits or a map that are NaN or infinite.
    """
    size = models[0].architecture.image_size
    # a rank takes whole batches, because a batch's size may change the last digit of a map
    batches = EvaluationBatches(packed, selection.samples, image_size=size, batch_size=batch_size)
    first, last = (len(batches) * rank // world.size for rank in (world.rank, world.rank + 1))
    digests: list[bytes] = []
    rows: list[list[np.ndarray]] = [
        [np.empty((2 * len(thresholds) + 2, 0), np.int64)] for _ in models
    ]
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for batch in read_batches(batches, range(first, last), workers=workers, device=device):
            masks = _read_masks(pool, packed, selection, batch, size)
            maps = [label_map(model, batch.images_BCHW, batch.labels_B, cam) for model in models]
            read = list(masks)
            digests += [mask.sha256 for mask in read]
            object_BHW = torch.from_numpy(np.stack([mask.pixels_HW for mask in read])).to(device)
            for parts, relevance_BP in zip(rows, maps, strict=True):
                parts.append(_count(relevance_BP, object_BHW, thresholds))
            progress(len(read))
    mine = [np.concatenate(parts, axis=1) for parts in rows]
    measured = _gather(mine, digests, len(selection.samples), size * size, world)
    bad = [found.bad for found in measured]
    named = names or ["the model"] * len(models)
    require_finite(world, named, bad, len(selection.samples), packed.url)
    return measured


def _gather(
    rows: Sequence[np.ndarray], digests: Sequence[bytes], samples: int, image: int, world: World
) -> list[Measured]:
    """Return all ranks' images in the order of the samples, for each model.

    Args:
        rows: of each model, this rank's rows of `_count`.
        digests: hashes of the masks that this rank read.
        samples: images of all ranks.
        image: pixels of an image.
        world: the ranks.
    """
    gathered = dist.gather_objects(world, (rows, digests))
    all_digests = b"".join(digest for _, part in gathered for digest in part)
    measured = []
    for number in range(len(rows)):
        rows_RN = np.concatenate([part[number] for part, _ in gathered], axis=1)
        assert rows_RN.shape[1] == samples, "an image was lost or counted twice"
        masked_TN, both_TN = np.split(rows_RN[2:], 2)
        pixels = Pixels(image=image, object_N=rows_RN[1], masked_TN=masked_TN, both_TN=both_TN)
        sha256, bad = files.sha256_bytes(all_digests), int(rows_RN[0].sum())
        measured.append(Measured(pixels=pixels, masks_sha256=sha256, bad=bad))
    return measured


def _read_masks(
    pool: ThreadPoolExecutor, packed: PackedDataset, selection: Selection, batch: Batch, size: int
) -> Iterator[ObjectMask]:
    """Start to read a batch's masks; the result waits for them."""
    index, encoding = packed.index, packed.manifest.encoding

    def read(sample: int) -> ObjectMask:
        source = int(index.width[sample]), int(index.height[sample])
        return read_mask(selection.paths[sample], source, size, encoding.get("crop_border", 0))

    return pool.map(read, batch.samples_B.tolist())


def _count(relevance_BP: Tensor, object_BHW: Tensor, thresholds: Sequence[float]) -> np.ndarray:
    """Return whether the map is bad, then object, masked and both pixels, int64 (2 + 2 T, B)."""
    object_BP = count_object(object_BHW, relevance_BP.shape[1])
    patch_pixels = object_BHW[0].numel() // relevance_BP.shape[1]
    mask_TBP = torch.stack([masking.object_mask(relevance_BP, value) for value in thresholds])
    masked_TB, both_TB = count_masked(mask_TBP, object_BP, patch_pixels)
    bad_B = (~is_finite(relevance_BP)).long()
    return torch.cat([bad_B[None], object_BP.sum(dim=1)[None], masked_TB, both_TB]).cpu().numpy()


def localise(
    arguments: Arguments, packed: PackedDataset, world: World, device: torch.device
) -> None:
    """Measure every checkpoint in one pass; the main rank writes and prints."""
    loaded, image_size = load_checkpoints(arguments.checkpoints, world)
    selection = select(
        packed, arguments.masks, arguments.classes, arguments.samples, arguments.seed
    )
    names = [packed.key(sample) for sample in selection.samples.tolist()]
    dist.require_agreement(world, "list of masks", files.sha256_json(names))
    models = [
        build_classifier(one.saved.state, one.saved.architecture).to(device) for one in loaded
    ]
    console = Console(file=sys.stderr)
    with Progress(console=console, disable=not (world.is_main and console.is_terminal)) as bar:
        task = bar.add_task(escape(arguments.set), total=len(selection.samples) / world.size)
        found = measure(
            [model.requires_grad_(False) for model in models],
            packed,
            selection,
            arguments.thresholds,
            cam=arguments.cam,
            world=world,
            device=device,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            progress=lambda done: bar.advance(task, done),
            names=[str(one.path) for one in loaded],
        )
    if not (found[0].pixels.object_N > 0).any():
        raise ValueError(f"all {len(names):,} masks below {arguments.masks} are empty")
    if world.is_main:
        for one, measured in zip(loaded, found, strict=True):
            document = describe(arguments, packed, selection, measured)
            write_result(one, document)
            patch = one.saved.architecture.vision_cfg.get("patch_size")
            is_b32 = (patch, image_size) == (32, 224)
            title = f"{one.path}{one.state_of_run}"
            print(format_table(title, document, beside_paper=is_b32), flush=True)


def describe(
    arguments: Arguments, packed: PackedDataset, selection: Selection, measured: Measured
) -> dict[str, Any]:
    """Return one checkpoint's counts and rates as a JSON document."""
    pixels = measured.pixels.with_object()
    rates = zip(mean_rates(pixels), pooled_rates(pixels), strict=True)
    images = len(measured.pixels.object_N)
    return {
        "set": arguments.set,
        "manifest_sha256": packed.manifest.sha256,
        "masks": str(arguments.masks),
        "masks_sha256": measured.masks_sha256,  # of the measured images' files, in this order
        "classes": arguments.classes,
        "cam": arguments.cam,
        "samples": arguments.samples,
        "seed": arguments.seed,
        "images": {
            "measured": len(pixels.object_N),
            "empty_mask": images - len(pixels.object_N),
            "without_mask": selection.missing,
        },
        "pixels": {
            "image": len(pixels.object_N) * pixels.image,
            "object": int(pixels.object_N.sum()),
        },
        "thresholds": [
            {
                "threshold": threshold,
                "pixels": {
                    "masked": int(pixels.masked_TN[place].sum()),
                    "both": int(pixels.both_TN[place].sum()),
                    "either": int(pixels.either[place].sum()),
                },
                "mean": asdict(mean),
                "pooled": asdict(pooled),
            }
            for place, (threshold, (mean, pooled)) in enumerate(
                zip(arguments.thresholds, rates, strict=True)
            )
        ],
    }


def result_path(checkpoint: Path) -> Path:
    """Return where the result of a run folder or weights file is kept."""
    if checkpoint.is_dir():
        return checkpoint / filenames.LOCALISATION
    return checkpoint.with_suffix(f".{filenames.LOCALISATION}")


def write_result(one: Loaded, document: dict[str, Any]) -> None:
    """Record one checkpoint's document, with the hashes of its weights and configuration.

    Raises:
        ValueError: if its weights were replaced since they were loaded.
    """
    one.require_unchanged()
    checkpoint, config = one.path, one.path / filenames.CONFIG
    document = {
        "schema": 1,
        "checkpoint": str(checkpoint_path(checkpoint).relative_to(checkpoint.parent)),
        "checkpoint_sha256": one.sha256,
        "step": int(one.saved.metadata["step"]),
        "unfinished": unfinished(checkpoint),
        "config_sha256": files.sha256_file(config) if config.is_file() else None,
        **document,
        "provenance": files.provenance(),
    }
    files.write_json(str(result_path(checkpoint)), document)


def format_table(title: str, document: dict[str, Any], *, beside_paper: bool) -> str:
    """Return the rates as Table 2 has them; the paper's own only beside the model it is about."""
    images, entries = document["images"], document["thresholds"]
    lines = [
        f"{title}: {document['set']}, mean over {images['measured']:,} images "
        f"({images['empty_mask']:,} more have an empty mask, {images['without_mask']:,} have none)",
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
    """Check what can be checked without reading anything.

    Raises:
        ValueError: naming the option.
    """
    if not arguments.checkpoints:
        raise ValueError("name at least one run folder or .safetensors file to measure")
    if not arguments.thresholds or len(set(arguments.thresholds)) < len(arguments.thresholds):
        raise ValueError("--thresholds needs at least one value, and each only once")
    if bad := [value for value in arguments.thresholds if not 0 <= value <= 1]:
        raise ValueError(f"--thresholds has {bad[0]:g}; a threshold lies in [0, 1]")


def main() -> None:
    """Parse, check, measure."""
    arguments = cli.parse(Arguments, prog="rft.evaluate.localisation")
    arguments = replace(arguments, set=urls.set_name(arguments.set, "--set"))
    check(arguments)
    url = files.join(arguments.data, arguments.set)
    packed = PackedDataset(url, max_pixels=arguments.max_pixels)
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
