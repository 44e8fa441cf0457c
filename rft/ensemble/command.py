"""Evaluate an ensemble of two models: `torchrun ... -m rft.ensemble KIND ZERO_SHOT ...`.

The results are a run folder without weights, which `rft.report` reads like any evaluated model.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import tyro
from pydantic import Field

from rft import cli, dist
from rft import next_steps as commands
from rft.config import MAX_PIXELS, Device
from rft.dist import World
from rft.ensemble import answers, pair
from rft.ensemble.answers import Work
from rft.ensemble.pair import Pair
from rft.evaluate.checkpoints import (
    Loaded,
    images_seen,
    load_checkpoints,
    require_classes,
    warn_of_other_split,
)
from rft.evaluate.forward import Kept
from rft.evaluate.results import (
    Evaluated,
    is_current,
    record_seen,
    say_results,
    write_results,
)
from rft.evaluate.temperature import fit_on, training_set
from rft.loading.dataset import PackedDataset
from rft.loading.features import FeatureFolder
from rft.loading.split import split_set
from rft.log import ASIDE
from rft.method import ensembling
from rft.progress import progress
from rft.recipes import EnsembleKind
from rft.runs import filenames, predictions, records
from rft.runs.folder import current_results
from rft.runs.records import Bank, Cluster, Clusters, Fitted, Temperature
from rft.sets import TEST_SETS
from rft.shards.guard import Seen
from rft.shards.manifest import Manifest
from rft.shards.root import set_names
from rft.storage import files
from rft.storage.documents import Above0, BatchSize, Megapixels, Positive, Share, Whole, document

log = logging.getLogger(__name__)

KINDS: tuple[EnsembleKind, ...] = get_args(EnsembleKind)


@document(name="--")
class Shared:
    """Options of every ensemble."""

    zero_shot: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ZERO_SHOT")]
    """The zero-shot model: a run folder or a .safetensors file."""
    fine_tuned: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FINE_TUNED")]
    """The fine-tuned model: a run folder or a .safetensors file."""
    data: str
    """Data root: folder or URL with the packed sets."""
    out: Path
    """Run folder for the results; it gets no weights."""
    sets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SET...")] = TEST_SETS
    """Packed sets to evaluate on: these, or others in the data root (for your own photos: test)."""
    batch_size: BatchSize = 256
    """Images read together; it never changes a result."""
    workers: Whole = 4
    """Loader processes per rank; 0 reads in the main process."""
    max_pixels: Megapixels = MAX_PIXELS
    """Limit on an image's size, in millions of pixels; raise it if a set was packed with more."""
    device: Device = "auto"
    features_dir: Path | None = None
    """Folder for the features of image towers, reused in later evaluations of the same towers and
    sets; safe to delete."""
    features_gb: Above0 = 10
    """Largest size of that folder, in GB."""


@document(name="--")
class Ose(Shared):
    """Output-space ensemble: (1 - alpha) x zero-shot + alpha x fine-tuned probabilities.

    Probabilities are the softmax over the classes that a set scores, without a temperature.
    """

    alpha: Share = 0.5
    """Share of the fine-tuned model, in [0, 1]."""


@document(name="--")
class Vrf(Shared):
    """VRF: probabilities weighted per image by its distance to the fine-tuned model's gains.

    The gains are the training images that the zero-shot model gets wrong and the fine-tuned model
    right. The squared distance d is that of the fine-tuned model's features, normalised to length
    1, to the k-th nearest gain, with k a thousandth of their number; the fine-tuned model's weight
    is sigmoid(-(d - CENTRE) / SCALE). Temperatures are fitted on held-out images; no test image is
    used for fitting.
    """

    centre: Annotated[float, Field(ge=0, le=4)] = ensembling.CENTRE
    """Squared distance at which both models have equal weight."""
    scale: Above0 = ensembling.SCALE
    """Scale of the distance over which the weight falls; larger is slower."""
    temperatures: Annotated[
        tuple[Above0, Above0] | None, tyro.conf.arg(metavar="ZERO_SHOT FINE_TUNED")
    ] = None
    """Of both models, in place of those fitted on held-out images."""


@document(name="--")
class Dawin(Shared):
    """DaWin: weights interpolated per cluster of test images by both models' entropies.

    DaWin is transductive: the clusters, and therefore the prediction of each image, depend on the
    other images of the test set. Reports mark this. Temperatures are fitted on held-out images.
    """

    components: Positive = ensembling.COMPONENTS
    """Number of clusters, each with its own merged weights."""
    temperatures: Annotated[
        tuple[Above0, Above0] | None, tyro.conf.arg(metavar="ZERO_SHOT FINE_TUNED")
    ] = None
    """Of both models, in place of those fitted on held-out images."""


@document(name="--")
class Arguments:
    """Evaluate an ensemble of two models. A rerun skips finished work."""

    ensemble: Annotated[
        Annotated[Ose, tyro.conf.subcommand(KINDS[0])]
        | Annotated[Vrf, tyro.conf.subcommand(KINDS[1])]
        | Annotated[Dawin, tyro.conf.subcommand(KINDS[2])],
        tyro.conf.arg(name=""),
    ]


def main() -> None:
    """Parse, skip finished work, evaluate the rest."""
    words = sys.argv[1:] or ["--help"]
    if not words[0].startswith("-") and words[0] not in KINDS:
        raise cli.unknown("ensemble", words[0], KINDS)
    arguments = cli.parse(Arguments, args=words, prog="rft.ensemble").ensemble
    if arguments.features_dir is not None:
        files.require_local(arguments.features_dir, "--features-dir")
    sets = set_names(arguments.sets, "--sets")
    packed = {
        name: PackedDataset(files.join(arguments.data, name), max_pixels=arguments.max_pixels)
        for name in sets
    }
    manifests = {name: dataset.manifest for name, dataset in packed.items()}
    found = _read(arguments)
    paths = [model.path for model in found.models]
    require_classes(paths, packed)
    predictions.require_no_links(found.path, sets)
    warn_of_other_split(paths, arguments.data)
    world = dist.world_from_env()
    device = dist.pick_device(arguments.device, world)
    with dist.process_group(world, device) as world:
        # ranks on several machines may see different files under one path
        hashes = {name: manifest.sha256 for name, manifest in manifests.items()}
        dist.require_agreement(world, "set of models and data", (found.sha256, hashes))
        done, seen, earlier = _look(found, manifests, arguments, world)
        if not done:
            _evaluate(replace(found, fitted=earlier), arguments, packed, seen, world, device)
        elif world.is_main:
            log.info("all results are current, nothing to do")
    if world.is_main:
        say_results([found.path], sets)
        cli.say_next(commands.report([found.path], arguments.data))


def _read(arguments: Ose | Vrf | Dawin) -> Pair:
    """Read the two models, and raise any of their errors before the work starts."""
    options: dict[str, Any] = {}
    kind: EnsembleKind
    match arguments:
        case Ose():
            kind = "ose"
            options["alpha"] = arguments.alpha
        case Vrf():
            kind = "vrf"
            options |= {"centre": arguments.centre, "scale": arguments.scale}
            options["share"] = ensembling.NEAREST_SHARE
        case Dawin():
            kind = "dawin"
            options["components"] = arguments.components
    if not isinstance(arguments, Ose):
        given = arguments.temperatures
        options["temperatures"] = None if given is None else list(given)
    found = pair.read_pair(kind, arguments.zero_shot, arguments.fine_tuned, arguments.out, options)
    if not isinstance(arguments, Ose) and arguments.temperatures is None:
        # called for its error, before any work
        pair.held_out(found)
    if isinstance(arguments, Vrf):
        pair.training_of(found)
    return found


def _look(
    found: Pair, manifests: Mapping[str, Manifest], arguments: Shared, world: World
) -> tuple[bool, dict[str, Seen | None], Fitted | None]:
    """Check for existing results, test images that were trained on, and earlier fits.

    Rank 0 decides, because files may change while others check them.
    """

    def look() -> tuple[bool, dict[str, Seen | None], Fitted | None]:
        of_each = images_seen([one.path for one in found.models], arguments.data, manifests)
        # an image that either model has seen must not test the ensemble
        seen = {name: _larger([one[name] for one in of_each]) for name in manifests}
        done = is_current(found.path, manifests)
        if done:
            record_seen(found.path, seen)
        return done, seen, found.earlier()

    return dist.from_main(world, dist.on_main(world, look))


def _larger(counts: Sequence[Seen | None]) -> Seen | None:
    """Combine the models' numbers of seen images; None if none is known to be seen, nor unseen."""
    largest = max(count or Seen() for count in counts)
    return None if None in counts and not largest.images else largest


def _evaluate(
    found: Pair,
    arguments: Ose | Vrf | Dawin,
    packed: Mapping[str, PackedDataset],
    seen: Mapping[str, Seen | None],
    world: World,
    device: torch.device,
) -> None:
    """Evaluate the ensemble on every set; the main rank writes the results."""
    loaded, models = load_checkpoints([one.path for one in found.models], world, device)
    kept = None
    if arguments.features_dir is not None:
        folder = FeatureFolder(arguments.features_dir, int(arguments.features_gb * 1e9))
        kept = Kept.of(folder, models)
    names = [str(one.path) for one in loaded]
    work = Work(
        (models[0], models[1]), names, world, device, arguments.batch_size, arguments.workers, kept
    )
    at = (1.0, 1.0)
    if not isinstance(arguments, Ose):
        found, at = _temperatures(found, arguments, work, loaded)
    mix = None
    if isinstance(arguments, Ose):
        mix = answers.ose(arguments.alpha)
    elif isinstance(arguments, Vrf):
        bank_ME, bank = _bank(found, arguments, work)
        found = replace(found, fitted=replace(found.fitted or Fitted(), bank=bank))
        mix = answers.vrf(bank_ME, bank.k, arguments.centre, arguments.scale, at)
    evaluated: dict[str, Evaluated] = {}
    clusters: dict[str, tuple[Cluster, ...]] = {}
    for name, dataset in packed.items():
        # DaWin has two passes; the total is the main rank's part, because only it shows a bar
        passes = 2 if isinstance(arguments, Dawin) else 1
        with progress(name, "images", passes * len(dataset) // world.size, ASIDE) as advance:
            if isinstance(arguments, Dawin):
                predicted, clusters[name] = answers.predict_dawin(
                    work, dataset, at, arguments.components, advance
                )
            else:
                assert mix is not None, "OSE and VRF mix probabilities"
                predicted = answers.predict_mixed(work, mix, dataset, advance)
        manifest = dataset.manifest
        evaluated[name] = Evaluated(
            predicted, manifest.sha256, None, seen[name], manifest.score, manifest.is_ood
        )
    if world.is_main:
        if clusters:
            _write_clusters(found, clusters)
        write_results(found, evaluated)


def _temperatures(
    found: Pair, arguments: Vrf | Dawin, work: Work, loaded: list[Loaded]
) -> tuple[Pair, tuple[float, float]]:
    """Fit the temperatures, or take them from options or an earlier fit; never on test images.

    Raises:
        ValueError: if a model has no best temperature.
    """
    if arguments.temperatures is not None:
        return found, arguments.temperatures
    fitted = found.fitted or Fitted()
    first, second = fitted.zero_shot, fitted.fine_tuned
    if first is None or second is None:
        first, second = _fit(found, arguments, work, loaded)
        found = replace(found, fitted=replace(fitted, zero_shot=first, fine_tuned=second))
    if work.world.is_main:
        log.info(
            f"temperatures on {first.images:,} held-out images: {work.names[0]} "
            f"{first.value:.4g}, {work.names[1]} {second.value:.4g}"
        )
    return found, (first.value, second.value)


def _fit(
    found: Pair, arguments: Vrf | Dawin, work: Work, loaded: list[Loaded]
) -> tuple[Temperature, Temperature]:
    """Fit both models' temperatures on the images that neither was trained on."""
    fitted = fit_on(
        pair.held_out(found),
        loaded,
        work.models,
        arguments.data,
        max_pixels=arguments.max_pixels,
        world=work.world,
        device=work.device,
        batch_size=work.batch_size,
        workers=work.workers,
    )
    for one, name in zip(fitted, work.names, strict=True):
        if not isinstance(one, Temperature):
            raise ValueError(
                f"{name}: {one}; set both temperatures with --temperatures, such as 1 1"
            )
    first, second = (one for one in fitted if isinstance(one, Temperature))
    return first, second


def _bank(found: Pair, arguments: Vrf, work: Work) -> tuple[torch.Tensor, Bank]:
    """Compute VRF's bank from the images that the fine-tuned model was trained on."""
    split = pair.training_of(found)
    packed = training_set(
        split,
        found.fine_tuned.path,
        arguments.data,
        arguments.max_pixels,
        "evaluate a different ensemble: VRF needs the training images",
    )
    # for a few-shot model, the images that it was trained on
    options = (split.held_out, split.shots, split.split_seed)
    samples: np.ndarray = split_set(packed.index, packed.manifest, *options)[0]
    with progress(split.name, "images", len(samples) // work.world.size, ASIDE) as advance:
        bank_ME = answers.gather_bank(work, packed, samples, advance)
    k = ensembling.nearest_rank(len(bank_ME))
    if work.world.is_main:
        log.info(
            f"{len(bank_ME):,} of {len(samples):,} training images are right only in "
            f"{work.names[1]}; distances are to the {k}. nearest"
        )
    return bank_ME, Bank(images=len(bank_ME), of=len(samples), k=k)


def _write_clusters(found: Pair, sets: Mapping[str, tuple[Cluster, ...]]) -> None:
    """Add the clusters of some sets to those of earlier calls."""
    found.write_config()  # first, because it makes the folder a run folder
    path = found.path / filenames.CLUSTERS
    earlier = records.find(path, Clusters) if current_results(found.path) else None
    document = Clusters(sets={**(earlier.sets if earlier else {}), **sets})
    files.write_json(str(path), asdict(document))
    for name, clusters in sets.items():
        parts = ", ".join(f"{one.images:,} at {one.share:.3f}" for one in clusters)
        cli.say(f"{name}: images by share of the fine-tuned weights: {parts}")
