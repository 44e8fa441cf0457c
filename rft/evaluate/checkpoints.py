"""Loads the weights of an evaluation: once, the same on every rank, with checked classes.

Averages are computed in memory from the weights of their models (`rft.evaluate.unwritten`).

A run that is still training may replace its selected weights at any time. Their hash is therefore
taken when they are loaded, and compared when the counts are written.
"""

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rft import dist
from rft.averages.average import Average, states
from rft.classes import check_head
from rft.clip.classifier import (
    Classifier,
    Saved,
    build_classifier,
    load_state,
    require_finite,
    to_bytes,
)
from rft.dist import World
from rft.evaluate.unwritten import System, Unwritten, header_of, path_of
from rft.loading.dataset import PackedDataset
from rft.loading.split import split_set
from rft.runs import derived, filenames, records
from rft.runs.filenames import SELECTED
from rft.runs.folder import checkpoint_path, current_results, unfinished
from rft.runs.trained_on import TrainedOn, of_model
from rft.sets import BENCHMARKS
from rft.shards.folder import MANIFEST
from rft.shards.guard import Located, Seen, find_set, seen_images
from rft.shards.index import Index
from rft.shards.manifest import Manifest, warn_of_one_class
from rft.storage import files, urls

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A loaded model; its tensors are in its classifier alone."""

    path: Path
    """The run folder or weights file that the user named, or the run folder of an average."""
    sha256: str
    saved: Saved
    average: Average | None = None
    """The average that these weights are, if no file holds them."""

    def record(self) -> dict[str, Any]:
        """Make the entries of a document of results that identify these weights and their run.

        The run folder of an average gets its config.json first.

        Raises:
            ValueError: if a training or merge replaced the weights after they were loaded.
        """
        # for an average, the path to which rft.merge would write them
        weights = checkpoint_path(self.path) if self.average is None else self.path / SELECTED
        config = self.path / filenames.CONFIG
        written = self.average is None or derived.is_complete(self.path, self.average.config)
        if written and files.sha256_file(weights) != self.sha256:
            raise ValueError(
                f"{weights} was replaced during its evaluation, so its counts are not recorded; "
                "evaluate it again when its run has finished"
            )
        if self.average is not None and not written and current_results(self.path) is None:
            files.write_json(str(config), self.average.config)
        return {
            # relative, so that the record stays true when the folder is moved
            "checkpoint": str(weights.relative_to(self.path.parent)),
            "checkpoint_sha256": self.sha256,
            "step": int(self.saved.metadata["step"]),
            "config_sha256": files.sha256_file(config) if config.is_file() else None,
            "unfinished": unfinished(self.path),
            **({} if written else {"without_weights": True}),
            "provenance": files.provenance(),
        }

    @property
    def state_of_run(self) -> str:
        """Progress of the run, in parentheses for a line of output; empty if it has ended."""
        reached = unfinished(self.path)
        return f" (unfinished, {reached})" if reached else ""


def load_checkpoints(
    systems: Sequence[System], world: World, device: torch.device
) -> tuple[list[Loaded], list[Classifier]]:
    """Load the selected weights of run folders, or weights files, and check that ranks agree.

    Returns:
        The checkpoints, and their classifiers on `device`, all with the same image size.
        Classifiers with equal towers share one.

    Raises:
        ValueError: if a file is damaged, ranks see different files, or image sizes differ.
    """
    # all models see the same batches, which are decoded at one size
    sizes = {header_of(one).architecture.image_size for one in systems}
    if len(sizes) > 1:
        raise ValueError(f"the checkpoints need images of {sorted(sizes)} px; evaluate them apart")
    made = states(one.average for one in systems if isinstance(one, Unwritten))
    loaded: list[Loaded] = []
    models: list[Classifier] = []
    for one in systems:
        if isinstance(one, Unwritten):
            saved = one.average.saved(next(made))
            require_finite(one.path, saved.state)
            # the hash of the file that rft.merge would write
            found = Loaded(one.path, files.sha256_bytes(to_bytes(saved)), saved, one.average)
        else:
            weights = checkpoint_path(one)
            found = Loaded(one, files.sha256_file(weights), load_state(weights))
        model = build_classifier(found.saved.state, found.saved.architecture).to(device)
        share_tower(model, models)
        models.append(model)
        # the weights of many models fit into memory only once: those on the device are kept
        loaded.append(replace(found, saved=found.saved._replace(state={})))
    # a run that still trains may replace its weights between the reads of two ranks
    dist.require_agreement(world, "set of weights", [one.sha256 for one in loaded])
    return loaded, models


def share_tower(model: Classifier, others: Sequence[Classifier]) -> None:
    """Let a model use another model's tower if both are equal, so that it is forwarded once."""
    state = model.visual.state_dict()
    for other in others:
        if model.architecture.difference(other.architecture):
            continue
        pairs = zip(state.values(), other.visual.state_dict().values(), strict=True)
        if all(torch.equal(own, its) for own, its in pairs):
            model.visual = other.visual
            break


def at_once(systems: Sequence[System], world: World, device: torch.device) -> int:
    """Estimate how many of the systems fit together into the memory of every rank's device."""
    if device.type != "cuda":
        return len(systems)
    # all in fp32; half of the free memory is kept for images and activations
    sizes = [sum(4 * v.numel() for v in header_of(one).state.values()) for one in systems]
    free, _ = torch.cuda.mem_get_info(device)
    return min(dist.gather_objects(world, max(1, free // 2 // max(sizes))))


def warn_of_other_split(systems: Sequence[System], data: str) -> None:
    """Warn of models whose training set differs from the one beside the test sets.

    Own photos are split anew when they are packed with a different seed or share, so a test image
    may be one that the model was trained on. ImageNet's sets have no images in common.
    """
    for one in systems:
        path = path_of(one)
        for name, trained_on, *_ in sorted(of_model(path, header_of(one).metadata)):
            found = _differing(data, name, trained_on)
            if found is None or _same_images(found, find_set(own_roots([one]), name, trained_on)):
                continue
            log.warning(
                f"{path} was trained on a different {name} (manifest {trained_on[:12]}) than "
                f"{files.join(data, name)} ({found.sha256[:12]}): it may have seen images of these "
                "test sets (docs/data.md#no-training-on-test-images)"
            )
            # one warning per model, however many sets it has seen
            break


def _differing(data: str, name: str, sha256: str) -> Manifest | None:
    """Read the set below a data root that has a training set's name, but not its manifest."""
    url = files.join(data, name)
    # a training set that is not beside the test sets cannot be compared
    if name in BENCHMARKS or not files.exists(files.join(url, MANIFEST)):
        return None
    found = Manifest.load(url)
    return found if found.sha256 != sha256 else None


def _same_images(one: Manifest, other: Located | None) -> bool:
    """Whether two sets hold the same images of the same classes, as after indexing tars again."""
    return (
        other is not None
        and one.samples_sha256 is not None
        and (one.samples_sha256, one.classes) == (other[1].samples_sha256, other[1].classes)
    )


def own_roots(systems: Iterable[System]) -> list[str]:
    """List the data roots on this machine that the models' own run folders name.

    A training set is often there and not beside the test sets. A run folder may be third-party, so
    no server that it names is contacted.
    """
    paths = [path_of(one) for one in systems]
    averages = [one.average for one in systems if isinstance(one, Unwritten)]
    paths += [model.path for average in averages for model in average.models]
    found: list[str] = []
    for path in paths:
        # the config.json only helps to find images, so a damaged one is no error here
        with contextlib.suppress(ValueError):
            config = records.find_config(path)
            models = (config.merged_from if config else None) or ()
            configs = (config, *(records.find_config(Path(model.path)) for model in models))
            found += [one.data for one in configs if one and one.data]
    return [root for root in dict.fromkeys(found) if not urls.is_whole(root)]


def images_seen(
    systems: Sequence[System], data: str, manifests: Mapping[str, Manifest]
) -> list[dict[str, Seen | None]]:
    """Count for each system the images of each set that it was trained on, with a warning.

    Training accuracy may be intended, so it is only a warning, and results.json has the count. It
    is None, also with a warning, if a training set is not available.
    """
    trained_on = [of_model(path_of(one), header_of(one).metadata) for one in systems]
    pairs = sorted({its.pair for one in trained_on for its in one})
    roots = [data, *own_roots(systems)]
    located = {pair: _locate(pair, roots, data, manifests) for pair in pairs}
    known = {}
    for one in dict.fromkeys(trained_on):
        its = {each.pair: located[each.pair] for each in sorted(one)}
        known[one] = seen_images(data, its, manifests, few_shot_parts(one, located))
    found = [known[one] for one in trained_on]
    models: dict[tuple[str, Seen], list[str]] = {}
    for system, counts in zip(systems, found, strict=True):
        for name, count in counts.items():
            if count and count.images:
                models.setdefault((name, count), []).append(str(path_of(system)))
    # one warning for all models: they often have the same training set
    for (name, (count, other)), paths in models.items():
        total = manifests[name].samples
        was, its_own = ("were", "their") if paths[1:] else ("was", "its")
        labels = f" ({other:,} under a different label; one label is wrong)" if other else ""
        off = [(count - other, "high"), (other, "low")]
        points = [f"up to {100 * n / total:.3g} points too {which}" for n, which in off if n]
        log.warning(
            f"{', '.join(paths)} {was} trained on {count:,} of the {total:,} images of {name}"
            f"{labels}: {its_own} accuracy there is {' and '.join(points)}"
        )
    # `warn_of_other_split` warns of a different set
    for pair in (one for one in pairs if not located[one] and not _differing(data, *one)):
        unchecked = {
            str(path_of(system)): [name for name, count in counts.items() if count is None]
            for system, one, counts in zip(systems, trained_on, found, strict=True)
            if pair in {its.pair for its in one} and None in counts.values()
        }
        if unchecked:
            names = dict.fromkeys(name for names in unchecked.values() for name in names)
            log.warning(
                f"training set {pair[0]} (manifest {pair[1][:12]}) is not below {data}: not "
                f"checked whether {', '.join(unchecked)} {'were' if len(unchecked) > 1 else 'was'} "
                f"trained on images of {', '.join(names)} "
                "(docs/data.md#no-training-on-test-images)"
            )
    return found


def _locate(
    pair: tuple[str, str], roots: Sequence[str], data: str, manifests: Mapping[str, Manifest]
) -> Located | None:
    """Find a training set below some data roots, or among the evaluated sets under any name."""
    for name, manifest in manifests.items():
        if manifest.sha256 == pair[1]:
            return files.join(data, name), manifest
    return find_set(roots, *pair)


def few_shot_parts(
    trained_on: Iterable[TrainedOn], located: Mapping[tuple[str, str], Located | None]
) -> dict[str, np.ndarray]:
    """Find the samples that a model has seen of each set that it was trained on with few shots.

    The result maps the manifest's hash of each set that was located to the samples; held-out
    samples count as seen. A set with a training without shots was seen completely and has no entry.
    """
    by_set: dict[str, list[TrainedOn]] = {}
    for one in trained_on:
        by_set.setdefault(one.manifest_sha256, []).append(one)
    found = {}
    for sha256, entries in by_set.items():
        sets = [its for one in entries if (its := located[one.name, sha256]) is not None]
        if sets and all(one.shots for one in entries):
            url, manifest = sets[0]
            # a damaged set is reported later, when it is compared
            with contextlib.suppress(ValueError):
                found[sha256] = _seen_by(entries, Index.load(url, manifest), manifest)
    return found


def _seen_by(entries: Iterable[TrainedOn], index: Index, manifest: Manifest) -> np.ndarray:
    splits = (
        split_set(index, manifest, one.held_out, one.shots, one.split_seed) for one in entries
    )
    return np.unique(np.concatenate([part for split in splits for part in split]))


def require_classes(systems: Sequence[System], packed: Mapping[str, PackedDataset]) -> None:
    """Check that checkpoints and sets have the same classes; warn if a file does not name them.

    Only headers are read.

    Raises:
        ValueError: naming the checkpoint, the set and the first different class.
    """
    for dataset in packed.values():
        warn_of_one_class(dataset.url, dataset.manifest.groups)
    for one in systems:
        saved, path = header_of(one), path_of(one)
        rows = len(saved.state["head.weight"])
        warnings = [
            warning
            for dataset in packed.values()
            for warning in check_head(
                saved.classes, rows, str(path), dataset.manifest.label_space, dataset.url
            )
        ]
        for warning in warnings[:1]:  # one warning for all sets
            log.warning(warning)
