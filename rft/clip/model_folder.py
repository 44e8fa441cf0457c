"""Run folder of a merged or imported model; `rft.runs.derived` recognises it."""

from pathlib import Path
from typing import Any

from rft.clip.classifier import Saved, require_finite, save_state
from rft.runs import filenames
from rft.runs.filenames import SELECTED
from rft.runs.folder import weights_record
from rft.storage import files


def write_run(out: Path, saved: Saved, config: dict[str, Any]) -> None:
    """Write the run folder; provenance.json is written last and marks it as complete.

    Raises:
        ValueError: if a weight is not finite.
    """
    require_finite(out, saved.state)
    files.write_json(str(out / filenames.CONFIG), config)
    save_state(str(out / SELECTED), *saved)
    kept = {"weights_sha256": weights_record(out)}
    files.write_json(str(out / filenames.PROVENANCE), files.provenance() | kept)
