"""Derived run folders: those of `rft.merge`, `rft.convert import` and `rft.ensemble`.

config.json has `merged_from` for a merge, `imported_from` for an import and `ensemble_of` for an
ensemble, whose folder never has weights. The source weights are identified by their hash, so a run
or a file may move between two calls. `rft.clip.model_folder` writes these folders.
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

SHOWN = 3  # differences, or runs, in an error
# the recipe of a soup or a Model Stock and the fit of an ensemble are known only afterwards
LATER_KNOWN = ("data", "soup", "stock", "fitted")

log = logging.getLogger(__name__)


def is_complete(out: Path, config: dict[str, Any]) -> bool:
    """Whether the run folder already holds this merge, import or ensemble, complete with weights.

    Raises:
        ValueError: if it holds a different model, or files that are no run.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; choose another")
    require_no_links(out)
    old = records.find_config(out)
    if old is None:
        # a killed writer leaves hidden files only
        if out.is_dir() and any(not found.name.startswith(".") for found in out.iterdir()):
            raise ValueError(f"{out} is not empty and not a run folder; choose another --out")
        return False
    # config has exactly one of merged_from, imported_from and ensemble_of
    origin = next(name for name in ORIGINS if name in config)
    kind = ORIGINS[origin]
    if getattr(old, origin) is None:
        what = "a training run" if old.is_training else "a different model"
        raise ValueError(f"{out} holds {what}; choose another --out")
    has_weights = (out / SELECTED).is_file()
    # a writer that stopped before its weights left nothing to lose, so --out may be used again
    if not has_weights and not (out / filenames.RESULTS).is_file():
        return False
    if changed := files.difference(_identity(old.whole), _identity(config)):
        raise ValueError(
            f"{out} holds a different {kind}: {'; '.join(changed[:SHOWN])}; choose another --out"
        )
    # results without weights: an average that was evaluated but never written
    if not has_weights:
        return False
    require_own_weights(out)
    # written last; if it is missing, the writer was stopped after the weights
    if not (out / filenames.PROVENANCE).is_file():
        return False
    if recorded_sha256(out, out / SELECTED) is None:
        log.warning(
            f"{out / filenames.PROVENANCE} has no weights_sha256, so {out / SELECTED} cannot be "
            f"verified as the weights of this {kind}; choose another --out to make them anew"
        )
    return True


def require_weights(weights: Path) -> None:
    """Check that a weights file exists.

    Raises:
        ValueError: if it does not; for an average, with the command that writes the weights.
    """
    folder = weights.parent.parent
    if folder / SELECTED == weights and not weights.exists():
        config = records.find_config(folder)
        if config is not None and config.ensemble_of is not None:
            raise ValueError(
                f"{folder} is an ensemble of two models and has no weights of its own; "
                "evaluate it with rft ensemble"
            )
        if config is not None and config.merged_from is not None:
            raise ValueError(
                f"{folder} is an average without weights, made by rft.evaluate --wise or --soup; "
                f"write them: {shlex.join(['python', *merge_words(folder, config)])}"
            )
        # the folder above a run, or the --out of rft photos
        found = [*folder.glob(f"*/{SELECTED}"), *folder.glob(f"runs/*/{SELECTED}")]
        if runs := sorted(str(one.parent.parent) for one in found):
            more = f" and {len(runs) - SHOWN} more" if len(runs) > SHOWN else ""
            raise ValueError(
                f"no checkpoint at {weights}; name one of the runs: {', '.join(runs[:SHOWN])}{more}"
            )
    files.require_file(weights, "checkpoint")


def merge_words(folder: Path, config: RunConfig) -> list[str]:
    """Rebuild the words after `python` of a merge from its configuration."""
    models = [model.path for model in config.merged_from or ()]
    if config.alpha is not None:
        words = ["wise", *models, "--alpha", str(config.alpha)]
        if config.whole.get("end_weights") == "last":
            words += ["--end-weights", "last"]
        if config.whole.get("parts") == "tower":
            words += ["--parts", "tower"]
    else:
        # the recipe of a soup is the name of its rft.merge subcommand
        words = [config.recipe, *models]
        if config.soup is not None:
            words += ["--data", config.data or "DATA"]
    return ["-m", "rft.merge", *words, "--out", str(folder)]


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """Keep the entries of a config.json that decide the result; paths are dropped."""
    known = {name: value for name, value in config.items() if name not in LATER_KNOWN}
    for origin in ("merged_from", "ensemble_of"):
        if origin in config:
            # numbered, so that a difference names the model; shortened, because it is printed
            sha256 = [record["sha256"] for record in config[origin]]
            return {**known, origin: {str(n): digest[:12] for n, digest in enumerate(sha256)}}
    source = {name: value for name, value in config["imported_from"].items() if name != "path"}
    return {**known, "imported_from": source}
