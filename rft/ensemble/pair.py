"""An ensemble as data: its two models, its options, and its run folder.

The folder never has weights. Its config.json identifies both models by their hashes, and
results.json has the hash of config.json. Results of other models or options are therefore detected
in the same way as those of other weights.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rft import recipes
from rft.averages.average import check_ends, warn_of_ends
from rft.averages.ingredients import Ingredient, check_alike, check_classes, read_ingredient
from rft.evaluate.temperature import held_out_of
from rft.recipes import EnsembleKind
from rft.runs import derived, filenames, records, trained_on
from rft.runs.folder import current_results
from rft.runs.records import Fitted
from rft.runs.trained_on import TrainedOn
from rft.storage import files

log = logging.getLogger(__name__)

NAMES = ("ZERO_SHOT", "FINE_TUNED")  # as on the command line


@dataclass(frozen=True)
class Pair:
    """A zero-shot and a fine-tuned model, and how they are combined."""

    path: Path
    """The ensemble's run folder."""
    zero_shot: Ingredient
    fine_tuned: Ingredient
    config: dict[str, Any]
    """Its config.json, without fitted values."""
    fitted: Fitted | None = None

    @property
    def models(self) -> tuple[Ingredient, Ingredient]:
        """Both models, the zero-shot one first."""
        return self.zero_shot, self.fine_tuned

    @property
    def sha256(self) -> str:
        """Hash of everything that decides the predictions: both models' weights, and options."""
        # without the models' paths, which may change; their hashes are added instead
        named = {name: value for name, value in self.config.items() if name != "ensemble_of"}
        weights = [model.sha256 for model in self.models]
        return files.sha256_bytes(json.dumps([weights, named], sort_keys=True).encode())

    def earlier(self) -> Fitted | None:
        """Read the fits of an earlier call with current results; None if there are none."""
        if current_results(self.path) is None:
            return None
        return records.read_config(self.path).fitted

    def write_config(self) -> None:
        """Write config.json, unless existing results belong to the current one."""
        if current_results(self.path) is None:
            fitted = {} if self.fitted is None else {"fitted": asdict(self.fitted)}
            files.write_json(str(self.path / filenames.CONFIG), {**self.config, **fitted})

    def record(self) -> dict[str, Any]:
        """Write config.json, then identify the ensemble for a document of results.

        Raises:
            ValueError: if a training or merge replaced weights since they were read.
        """
        for model in self.models:
            if files.sha256_file(model.weights) != model.sha256:
                raise ValueError(
                    f"{model.weights} was replaced during the evaluation, so the counts are not "
                    "recorded; wait until its run has finished, then evaluate it again"
                )
        self.write_config()
        return {
            "checkpoint": "",
            "checkpoint_sha256": self.sha256,
            "step": self.fine_tuned.steps,
            "config_sha256": files.sha256_file(self.path / filenames.CONFIG),
            "without_weights": True,
            "provenance": files.provenance(),
        }


def read_pair(
    kind: EnsembleKind, zero_shot: Path, fine_tuned: Path, out: Path, options: Mapping[str, Any]
) -> Pair:
    """Read the headers of both models, but no weights.

    Raises:
        ValueError: if one is damaged, they have different classes or are swapped, or `out` contains
            anything except results of this ensemble.
    """
    models = read_ingredient(zero_shot), read_ingredient(fine_tuned)
    first, second = models
    if first.sha256 == second.sha256:
        raise ValueError(f"{zero_shot} and {fine_tuned} are the same weights; name two models")
    check_ends(*models, names=NAMES)
    if kind == "dawin":  # DaWin mixes their weights
        check_alike(models)
    else:
        for warning in check_classes(models):
            log.warning(warning)
    known = second.recipe in ("", "vanilla")
    config = {
        "recipe": kind if known else f"{kind}-{second.recipe}",
        "seed": second.seed,
        "ensemble": {"kind": kind, **options},
        **({"transductive": True} if recipes.ENSEMBLES[kind].transductive else {}),
        "ensemble_of": [model.record() for model in models],
    }
    # called for its error, if `out` holds anything else
    derived.is_complete(out, config)
    warn_of_ends(*models, names=NAMES)
    return Pair(out, first, second, config)


def training_of(pair: Pair) -> TrainedOn:
    """Find the one set that the fine-tuned model was trained on.

    Raises:
        ValueError: if it is unknown, or there are several.
    """
    seen = trained_on.of_model(pair.fine_tuned.path, pair.fine_tuned.saved.metadata)
    if len(seen) != 1:
        why = "its training set is" if not seen else f"it was trained on {len(seen)} sets:"
        names = " " + ", ".join(sorted(one.name for one in seen)) if seen else " unknown"
        raise ValueError(
            f"{pair.fine_tuned.path}: {why}{names}; name a run of rft.train, whose training images "
            "the ensemble is made with"
        )
    (found,) = seen
    return found


def held_out(pair: Pair) -> TrainedOn:
    """Find the split whose held-out images neither model was trained on.

    Raises:
        ValueError: if there is none.
    """
    fine_tuned, zero_shot = pair.fine_tuned, pair.zero_shot
    otherwise = "set both temperatures with --temperatures, such as 1 1"
    try:
        found = held_out_of(fine_tuned.path, fine_tuned.saved.metadata)
    except ValueError as error:
        raise ValueError(
            f"{fine_tuned.path} has no images to fit its temperature on: {error}; {otherwise}"
        ) from error
    seen = trained_on.of_model(zero_shot.path, zero_shot.saved.metadata)
    if seen - {found}:
        raise ValueError(
            f"{zero_shot.path} was trained on images that {fine_tuned.path} held out, so its "
            f"temperature must not be fitted on them; {otherwise}"
        )
    return found
