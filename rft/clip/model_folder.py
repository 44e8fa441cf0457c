"""Writes the run folder of a model that no training made; `rft.runs.derived` recognises it."""

from pathlib import Path
from typing import Any

from torch import Tensor

from rft.classes import Classes
from rft.clip.architecture import Architecture
from rft.clip.classifier import require_finite, save_state
from rft.runs import filenames
from rft.runs.filenames import SELECTED
from rft.runs.folder import weights_record
from rft.storage import files


def write_run(
    out: Path,
    state: dict[str, Tensor],
    architecture: Architecture,
    config: dict[str, Any],
    metadata: dict[str, str],
    classes: Classes | None,
) -> None:
    """Write the run folder; provenance.json comes last and marks it as complete.

    Raises:
        ValueError: if a weight is not finite.
    """
    require_finite(out, state)
    files.write_json(str(out / filenames.CONFIG), config)
    # over the recipe of the model that a merge takes its metadata from
    metadata = {**metadata, "recipe": config["recipe"]}
    save_state(str(out / SELECTED), state, architecture, metadata, classes)
    kept = {"weights_sha256": weights_record(out)}
    files.write_json(str(out / filenames.PROVENANCE), files.provenance() | kept)
