"""Evaluate models exactly: `torchrun ... -m rft.evaluate CHECKPOINT... --data URL`.

All models, checkpoints and averages of them, are evaluated in one pass over the data. Models that
share an image tower forward it once.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from rft import cli, dist
from rft import next_steps as commands
from rft.averages.average import Parts
from rft.averages.ingredients import EndWeights
from rft.config import MAX_PIXELS, Device
from rft.dist import World
from rft.evaluate.checkpoints import (
    at_once,
    images_seen,
    load_checkpoints,
    require_classes,
    warn_of_other_split,
)
from rft.evaluate.count import predict
from rft.evaluate.forward import Kept
from rft.evaluate.results import (
    Evaluated,
    is_current,
    record_seen,
    say_results,
    warn_of_no_temperature,
    write_results,
)
from rft.evaluate.temperature import fit_temperatures
from rft.evaluate.unwritten import System, path_of, read_averages
from rft.loading.dataset import PackedDataset
from rft.loading.features import FeatureFolder
from rft.log import ASIDE
from rft.progress import progress
from rft.runs import predictions
from rft.runs.derived import require_weights
from rft.runs.folder import checkpoint_path, require_own_weights, unfinished
from rft.runs.records import Temperature
from rft.sets import TEST_SETS
from rft.shards.guard import Seen
from rft.shards.manifest import Manifest
from rft.shards.root import set_names
from rft.storage import files
from rft.storage.documents import Above0, BatchSize, Megapixels, Whole, document

log = logging.getLogger(__name__)


@document(name="--")
class Arguments:
    """Count correct predictions on packed test sets: those of your photos, or of the paper.

    The counts of a run folder are written to its results.json and the predictions for each image to
    its predictions/; for FILE.safetensors to FILE.results.json and FILE.predictions/. Checkpoints
    that already have counts of the same weights and data are skipped.
    """

    checkpoints: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders (the selected model; the last without held-out images) or .safetensors files."""
    data: str
    """Data root: the URL that contains the packed sets."""
    wise: Annotated[
        tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]],
        tyro.conf.arg(metavar="START END A..."),
    ] = ()
    """Also evaluate WiSE-FT models of these ends and alphas, averaged in memory like those of
    `rft.merge wise`."""
    soup: Annotated[
        tyro.conf.UseAppendAction[tuple[tuple[Path, ...], ...]],
        tyro.conf.arg(metavar="MODEL MODEL..."),
    ] = ()
    """Also evaluate the uniform soup of these models, averaged in memory (`rft.merge
    uniform-soup`)."""
    out: Path | None = None
    """Folder for the results of --wise and --soup: one run folder per recipe, without weights."""
    end_weights: EndWeights = "best"
    """Weights of each END of --wise: selected, or of the last step, as in `rft.merge wise`."""
    parts: Parts = "all"
    """Parts that --wise interpolates: every weight or the image tower, as in `rft.merge wise`."""
    sets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SET...")] = TEST_SETS
    """Packed sets to evaluate on: these, or any other below the data root (test for own photos)."""
    batch_size: BatchSize = 256
    """Images per read. Results do not depend on it: each forward takes 64 images."""
    logits: bool = False
    """Also keep all logits in half precision: 100 MB for ImageNet's 50,000 images."""
    temperature: bool = False
    """Fit each model's temperature on the images that its training held out, and also keep the
    confidences at that temperature. The training set must be below --data."""
    workers: Whole = 4
    """Loader processes per rank; 0 reads in the evaluating process."""
    max_pixels: Megapixels = MAX_PIXELS
    """Limit of an image, in millions of pixels; raise it if a set was packed with a higher one."""
    device: Device = "auto"
    features_dir: Path | None = None
    """Folder to cache the features of image towers in, for later evaluations of heads on the same
    towers (zero-shot, linear probes) and sets; safe to delete."""
    features_gb: Above0 = 10
    """Size limit of that folder, in GB."""


def evaluate(
    systems: Sequence[System],
    packed: dict[str, PackedDataset],
    arguments: Arguments,
    seen: Sequence[dict[str, Seen | None]],
    world: World,
    device: torch.device,
) -> None:
    """Evaluate some systems on every set in one pass; the main rank writes their results.

    `seen` counts for each system the images of each set that it was trained on.
    """
    loaded, models = load_checkpoints(systems, world, device)
    sets: list[dict[str, Evaluated]] = [{} for _ in models]
    temperatures: Sequence[Temperature | str | None] = [None] * len(models)
    if arguments.temperature:
        temperatures = fit_temperatures(
            loaded,
            models,
            arguments.data,
            max_pixels=arguments.max_pixels,
            world=world,
            device=device,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
        )
    kept = None
    if arguments.features_dir is not None:
        folder = FeatureFolder(arguments.features_dir, int(arguments.features_gb * 1e9))
        kept = Kept.of(folder, models)
    for name, dataset in packed.items():
        # the bar counts the main rank's part, because only the main rank shows it
        with progress(name, "images", len(dataset) // world.size, ASIDE) as advance:
            predicted = predict(
                models,
                dataset,
                image_size=models[0].architecture.image_size,
                world=world,
                device=device,
                batch_size=arguments.batch_size,
                workers=arguments.workers,
                progress=advance,
                names=[str(one.path) for one in loaded],
                kept=kept,
                logits=np.float16 if arguments.logits else None,
                temperatures=[
                    one.value if isinstance(one, Temperature) else None for one in temperatures
                ],
            )
        manifest = dataset.manifest
        for number, entry in enumerate(sets):
            entry[name] = Evaluated(
                predicted[number],
                manifest.sha256,
                temperatures[number],
                seen[number][name],
                manifest.score,
                manifest.is_ood,
            )
    if world.is_main:
        for one, entry in zip(loaded, sets, strict=True):
            write_results(one, entry)


def find_systems(arguments: Arguments) -> list[System]:
    """Collect the models and averages of the command line, each run folder once.

    Raises:
        ValueError: if it names none, one that does not exist, or an average that cannot be made.
    """
    for path in arguments.checkpoints:
        require_weights(checkpoint_path(path))
    averages = read_averages(
        arguments.wise, arguments.soup, arguments.out, arguments.end_weights, arguments.parts
    )
    # by path, because an average that was already merged may also be named as a run folder
    found = {path_of(one): one for one in (*arguments.checkpoints, *averages)}
    if not found:
        raise ValueError("name at least one run folder or .safetensors file to evaluate")
    return list(found.values())


def waiting(
    systems: Sequence[System],
    manifests: Mapping[str, Manifest],
    arguments: Arguments,
    world: World,
) -> tuple[list[System], list[dict[str, Seen | None]]]:
    """Find the systems without current results, and count the images of each set they have seen.

    Systems with current results get these counts recorded. Rank 0 decides for all, because files
    may change between the reads of two ranks, and the hashes of a training set are megabytes.
    """

    def look() -> tuple[list[int], list[dict[str, Seen | None]]]:
        seen = images_seen(systems, arguments.data, manifests)
        left = []
        for number, one in enumerate(systems):
            wanted = {"logits": arguments.logits, "temperature": arguments.temperature}
            if is_current(path_of(one), manifests, **wanted):
                record_seen(path_of(one), seen[number])
            else:
                left.append(number)
        return left, seen

    numbers, seen = dist.from_main(world, dist.on_main(world, look))
    return [systems[number] for number in numbers], [seen[number] for number in numbers]


def main() -> None:
    """Evaluate the models that have no current results."""
    arguments = cli.parse(Arguments, prog="rft.evaluate")
    # before the ranks join, because an error that all ranks see is printed once
    sets = set_names(arguments.sets, "--sets")
    systems = find_systems(arguments)
    if arguments.features_dir is not None:
        files.require_local(arguments.features_dir, "--features-dir")
    packed = {
        name: PackedDataset(files.join(arguments.data, name), max_pixels=arguments.max_pixels)
        for name in sets
    }
    manifests = {name: dataset.manifest for name, dataset in packed.items()}
    require_classes(systems, packed)
    for one in systems:
        predictions.require_no_links(path_of(one), sets)
    for path in arguments.checkpoints:
        require_own_weights(path)
        unfinished(path)  # a damaged record fails before the evaluation
    warn_of_other_split(systems, arguments.data)
    world = dist.world_from_env()
    device = dist.pick_device(arguments.device, world)
    with dist.process_group(world, device) as world:
        hashes = {name: manifest.sha256 for name, manifest in manifests.items()}
        dist.require_agreement(world, "set of packed data", hashes)
        left, seen = waiting(systems, manifests, arguments, world)
        if left:
            together = at_once(left, world, device)
            if together < len(left) and world.is_main:
                log.info(
                    f"GPU memory holds {together} of {len(left)} models at once, so the data are "
                    "read several times"
                )
            for first in range(0, len(left), together):
                part = slice(first, first + together)
                evaluate(left[part], packed, arguments, seen[part], world, device)
        elif world.is_main:
            log.info("all results are current, nothing to do")
    if world.is_main:
        _say(systems, sets, arguments)


def _say(systems: Sequence[System], sets: Sequence[str], arguments: Arguments) -> None:
    """Print the results, also those of an earlier call, and the next command."""
    paths = [path_of(one) for one in systems]
    say_results(paths, sets)
    if arguments.temperature:
        warn_of_no_temperature(paths, sets)
    if runs := [path for path in paths if path.is_dir()]:
        cli.say_next(commands.report(runs, arguments.data))
