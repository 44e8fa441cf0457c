"""Evaluate models exactly: `torchrun ... -m rft.evaluate CHECKPOINT... --data URL`.

All models, checkpoints and averages of them, see each image in the same pass over the data, and
those that share an image tower forward it once.
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
from rft.runs.folder import require_own_weights, unfinished
from rft.runs.records import Temperature
from rft.sets import TEST_SETS
from rft.shards.manifest import Manifest
from rft.shards.root import set_names
from rft.storage import files
from rft.storage.documents import Above0, BatchSize, Megapixels, Whole, document

log = logging.getLogger(__name__)


@document(name="--")
class Arguments:
    """Count correct predictions on packed test sets: those of your photos, or of the paper.

    A run folder's counts go to its results.json and what it predicts for each image to its
    predictions/, those of FILE.safetensors to FILE.results.json and FILE.predictions/.
    Checkpoints whose counts are already there, for the same weights and data, are not evaluated
    again.
    """

    checkpoints: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders (the selected model; the last without held-out images) or .safetensors files."""
    data: str
    """Data root: the URL under which the tools wrote the packed sets."""
    wise: Annotated[
        tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]],
        tyro.conf.arg(metavar="START END A..."),
    ] = ()
    """WiSE-FT models of these ends and alphas too, averaged in memory as `rft.merge wise` does."""
    soup: Annotated[
        tyro.conf.UseAppendAction[tuple[tuple[Path, ...], ...]],
        tyro.conf.arg(metavar="MODEL MODEL..."),
    ] = ()
    """The uniform soup of these models too, likewise (`rft.merge uniform-soup`)."""
    out: Path | None = None
    """Folder for results of --wise and --soup: a run folder without weights for each, by recipe."""
    end_weights: EndWeights = "best"
    """Weights of each END of --wise: selected, or of the last step, as in `rft.merge wise`."""
    parts: Parts = "all"
    """What each --wise interpolates: every weight or the image tower, as in `rft.merge wise`."""
    sets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SET...")] = TEST_SETS
    """Packed sets to evaluate on: these, or any other below the data root (of own photos: test)."""
    batch_size: BatchSize = 256
    """Images that are read together. It changes no result: each forward takes 64 of them."""
    logits: bool = False
    """Keep all logits in half precision too: 100 MB for ImageNet's 50,000 images."""
    temperature: bool = False
    """Fit each model's temperature on the images that its training held out, and keep confidences
    at that temperature too. The training set must lie below --data."""
    workers: Whole = 4
    """Loader processes of each rank; 0 reads in the evaluating process."""
    max_pixels: Megapixels = MAX_PIXELS
    """Millions of pixels that an image may have; raise it if a set was packed so."""
    device: Device = "auto"
    features_dir: Path | None = None
    """Folder in which the features of image towers are kept, for later evaluations of heads on the
    same towers (zero-shot, linear probes) and sets; safe to delete."""
    features_gb: Above0 = 10
    """Largest size of that folder, in GB."""


def evaluate(
    systems: Sequence[System],
    packed: dict[str, PackedDataset],
    arguments: Arguments,
    seen: Sequence[dict[str, int]],
    world: World,
    device: torch.device,
) -> None:
    """Evaluate some systems on every set in one pass; write their results from the main rank.

    `seen` are how many images of each set each system was trained on.
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
        # the main rank's part: only it shows a bar
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
                seen[number].get(name, 0),
                manifest.score,
                manifest.is_ood,
            )
    if world.is_main:
        for one, entry in zip(loaded, sets, strict=True):
            write_results(one, entry)


def find_systems(arguments: Arguments) -> list[System]:
    """Return what the command line names, each run folder once.

    Raises:
        ValueError: if it names nothing, or an average that cannot be made.
    """
    averages = read_averages(
        arguments.wise, arguments.soup, arguments.out, arguments.end_weights, arguments.parts
    )
    # by name: an average that was merged before may be named as a run folder, too
    found = {path_of(one): one for one in (*arguments.checkpoints, *averages)}
    if not found:
        raise ValueError("name at least one run folder or .safetensors file to evaluate")
    return list(found.values())


def waiting(
    systems: Sequence[System],
    manifests: Mapping[str, Manifest],
    arguments: Arguments,
    world: World,
) -> tuple[list[System], list[dict[str, int]]]:
    """Return the systems without current results, and how many images of each set each has seen.

    The results of the others get the latter. Rank 0 decides, because files may change while the
    others look at them, and the hashes of a training set are megabytes.
    """

    def look() -> tuple[list[int], list[dict[str, int]]]:
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
    """Parse, skip what is done, evaluate the rest."""
    arguments = cli.parse(Arguments, prog="rft.evaluate")
    # before the ranks join: a mistake that all of them see is printed once
    systems = find_systems(arguments)
    if arguments.features_dir is not None:
        files.require_local(arguments.features_dir, "--features-dir")
    sets = set_names(arguments.sets, "--sets")
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
        unfinished(path)  # a damaged record is found before the work
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
                    f"the GPU's memory holds {together} of {len(left)} models at once, so the data "
                    "are read several times"
                )
            for first in range(0, len(left), together):
                part = slice(first, first + together)
                evaluate(left[part], packed, arguments, seen[part], world, device)
        elif world.is_main:
            log.info("all counts are already there, nothing to do")
        if arguments.temperature and world.is_main:
            warn_of_no_temperature([path_of(one) for one in systems], sets)
    runs = [path for path in map(path_of, systems) if path.is_dir()]
    if world.is_main and runs:
        cli.say_next(commands.report(runs, arguments.data))
