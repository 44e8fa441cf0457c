"""The weights that an evaluation counts with: read once, the same on every rank, of known classes.

A run that is still training replaces its selected weights at any time. Their hash is therefore
taken when they are loaded, and compared when the counts are written.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rft import dist
from rft.classes import check_head
from rft.clip.classifier import Classifier, Saved, build_classifier, load_state, map_state
from rft.dist import World
from rft.loading.dataset import PackedDataset
from rft.runs import filenames
from rft.runs.folder import checkpoint_path, unfinished
from rft.runs.trained_on import of_model
from rft.sets import BENCHMARKS
from rft.shards.folder import MANIFEST
from rft.shards.manifest import Manifest, warn_of_one_class
from rft.storage import files

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """One checkpoint in memory."""

    path: Path
    """The run folder or weights file that the user named."""
    sha256: str
    saved: Saved

    def record(self) -> dict[str, Any]:
        """Identify these weights, and the run that they are of, in a document of results.

        Raises:
            ValueError: if a training replaced them since they were loaded.
        """
        weights, config = checkpoint_path(self.path), self.path / filenames.CONFIG
        if files.sha256_file(weights) != self.sha256:
            raise ValueError(
                f"{weights} was replaced while it was evaluated, so its counts are not recorded; "
                "wait until its run has finished, then evaluate it again"
            )
        return {
            # without the folders above, so that a moved folder keeps a true record
            "checkpoint": str(weights.relative_to(self.path.parent)),
            "checkpoint_sha256": self.sha256,
            "step": int(self.saved.metadata["step"]),
            "config_sha256": files.sha256_file(config) if config.is_file() else None,
            "unfinished": unfinished(self.path),
            "provenance": files.provenance(),
        }

    @property
    def state_of_run(self) -> str:
        """How far the run is, in parentheses for a line of output; empty if it has ended."""
        reached = unfinished(self.path)
        return f" (unfinished, {reached})" if reached else ""


def load_checkpoints(
    paths: Sequence[Path], world: World, device: torch.device
) -> tuple[list[Loaded], list[Classifier]]:
    """Read the selected weights of run folders, or weights files; all ranks have the same ones.

    Returns:
        The checkpoints, and their classifiers on `device`, which all take images of one size.
        Those of equal towers share one.

    Raises:
        ValueError: if one is damaged, ranks see different files, or their image sizes differ.
    """
    loaded = []
    for path in paths:
        weights = checkpoint_path(path)
        # first: its errors are clearer than those of a hash of no file or of a folder
        map_state(weights)
        loaded.append(Loaded(path, files.sha256_file(weights), load_state(weights)))
    # a run that still trains may replace its weights between the reads of two ranks
    dist.require_agreement(world, "set of weights", [one.sha256 for one in loaded])
    # all models see the same batches, which are decoded at one size
    sizes = {one.saved.architecture.image_size for one in loaded}
    if len(sizes) > 1:
        raise ValueError(f"the checkpoints want images of {sorted(sizes)} px; evaluate them apart")
    built = [build_classifier(one.saved.state, one.saved.architecture) for one in loaded]
    share_towers(built)
    return loaded, [model.to(device) for model in built]


def share_towers(models: Sequence[Classifier]) -> None:
    """Give models with equal towers one and the same, which is then forwarded once for all."""
    for number, model in enumerate(models):
        state = model.visual.state_dict()
        for other in models[:number]:
            if model.architecture.difference(other.architecture):
                continue
            pairs = zip(state.values(), other.visual.state_dict().values(), strict=True)
            if all(torch.equal(own, its) for own, its in pairs):
                model.visual = other.visual
                break


def warn_of_other_split(paths: Sequence[Path], data: str) -> None:
    """Warn of models whose training set is not the one beside the test sets of their evaluation.

    Own photos are split anew when they are packed with a different seed or share: a test image may
    then be one that the model was trained on. ImageNet's sets have no images in common.
    """
    for path in paths:
        metadata = map_state(checkpoint_path(path)).metadata
        for name, trained_on, *_ in sorted(of_model(path, metadata)):
            url = files.join(data, name)
            # a set that is not beside the test sets cannot be compared
            if name in BENCHMARKS or not files.exists(files.join(url, MANIFEST)):
                continue
            found = Manifest.load(url).sha256
            if found != trained_on:
                log.warning(
                    f"{path} was trained on another {name} (manifest {trained_on[:12]}) than "
                    f"{url} ({found[:12]}): it may have seen images of these test sets"
                )
                # one line per model, however many sets it has seen
                break


def require_classes(paths: Sequence[Path], packed: Mapping[str, PackedDataset]) -> None:
    """Check that checkpoints and sets have the same classes; warn where a file does not say.

    Only headers are read.

    Raises:
        ValueError: naming the checkpoint, the set and the first class that differs.
    """
    for dataset in packed.values():
        warn_of_one_class(dataset.url, dataset.manifest.groups)
    for path in paths:
        saved = map_state(checkpoint_path(path))
        rows = len(saved.state["head.weight"])
        warnings = [
            warning
            for dataset in packed.values()
            for warning in check_head(
                saved.classes, rows, str(path), dataset.manifest.label_space, dataset.url
            )
        ]
        for warning in warnings[:1]:  # one for all sets
            log.warning(warning)
