"""Run folders that no training made: of `rft.merge`, `rft.convert import` and `rft.ensemble`.

A merge is known by `merged_from` in its config.json, an import by `imported_from`, an ensemble,
whose folder never has weights, by `ensemble_of`. The weights that
they came from are known by their hash, so that a run or a file may move between two calls.
`rft.clip.model_folder` writes them.
"""

import logging
import shlex
from pathlib import Path
from typing import Any

from rft.runs import filenames, records
from rft.runs.filenames import SELECTED
from rft.runs.folder import recorded_sha256, require_no_links, require_own_weights
from rft.runs.records import ORIGINS, RunConfig
from rft.storage import files

SHOWN = 3  # differences in an error
# how a soup or a Model Stock came about, and what an ensemble fitted, are known only afterwards
LATER_KNOWN = ("data", "soup", "stock", "fitted")

log = logging.getLogger(__name__)


def is_complete(out: Path, config: dict[str, Any]) -> bool:
    """Whether the run folder already holds this merge, import or ensemble, complete with weights.

    Raises:
        ValueError: if it holds anything else.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; choose another")
    require_no_links(out)
    old = records.find_config(out)
    if old is None:
        # what a killed writer left is hidden
        if out.is_dir() and any(not found.name.startswith(".") for found in out.iterdir()):
            raise ValueError(f"{out} has files in it but is no run folder; choose another --out")
        return False
    # each names one: merged_from, imported_from or ensemble_of
    origin = next(name for name in ORIGINS if name in config)
    kind = ORIGINS[origin]
    if getattr(old, origin) is None:
        what = "a training run" if old.is_training else "another model"
        raise ValueError(f"{out} holds {what}; choose another --out")
    has_weights = (out / SELECTED).is_file()
    # one that stopped before its weights were there left nothing that another could spoil
    if not has_weights and not (out / filenames.RESULTS).is_file():
        return False
    if changed := files.difference(_identity(old.whole), _identity(config)):
        raise ValueError(
            f"{out} holds another {kind}: {'; '.join(changed[:SHOWN])}; choose another --out"
        )
    # counts alone: of an average that was evaluated without being written
    if not has_weights:
        return False
    require_own_weights(out)
    # written last: without it the writer was stopped after the weights
    if not (out / filenames.PROVENANCE).is_file():
        return False
    if recorded_sha256(out, out / SELECTED) is None:
        log.warning(
            f"{out / filenames.PROVENANCE} has no weights_sha256: whether {out / SELECTED} are the "
            f"weights of this {kind} is not known; choose another --out to make them anew"
        )
    return True


def require_weights(weights: Path) -> None:
    """Check that a weights file exists.

    Raises:
        ValueError: naming it, or the command that writes it in the folder of an average.
    """
    folder = weights.parent.parent
    if folder / SELECTED == weights and not weights.exists():
        config = records.find_config(folder)
        if config is not None and config.ensemble_of is not None:
            raise ValueError(
                f"{folder} is an ensemble of two models and has no weights of its own; "
                "python -m rft.ensemble evaluates it"
            )
        if config is not None and config.merged_from is not None:
            raise ValueError(
                f"{folder} is an average without weights, as rft.evaluate --wise and --soup leave "
                f"it; write them: {_merge_command(folder, config)}"
            )
    files.require_file(weights, "checkpoint")


def _merge_command(folder: Path, config: RunConfig) -> str:
    """Return the command line that makes a merge."""
    models = [model.path for model in config.merged_from or ()]
    if config.alpha is not None:
        words = ["wise", *models, "--alpha", str(config.alpha)]
        if config.whole.get("end_weights") == "last":
            words += ["--end-weights", "last"]
        if config.whole.get("parts") == "tower":
            words += ["--parts", "tower"]
    else:
        # a soup's recipe is the merge's name
        words = [config.recipe, *models]
        if config.soup is not None:
            words += ["--data", config.data or "DATA"]
    return shlex.join(["python", "-m", "rft.merge", *words, "--out", str(folder)])


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a config.json that decide the result, without paths."""
    known = {name: value for name, value in config.items() if name not in LATER_KNOWN}
    for origin in ("merged_from", "ensemble_of"):
        if origin in config:
            # numbered, so that a difference names the model; cut, because it is printed
            sha256 = [record["sha256"] for record in config[origin]]
            return {**known, origin: {str(n): digest[:12] for n, digest in enumerate(sha256)}}
    source = {name: value for name, value in config["imported_from"].items() if name != "path"}
    return {**known, "imported_from": source}
