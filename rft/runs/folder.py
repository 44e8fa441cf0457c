"""The files of a run folder that several commands read: selected weights, state, results.

Counts belong to the weights that they were measured with. results.json therefore has the hash of
the weights, and every reader of a count compares it. No torch: the report uses this too.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from rft.runs import filenames, header, records
from rft.runs.filenames import LAST, SELECTED, WRITTEN_THROUGH
from rft.runs.records import Results
from rft.sets import TRAIN_SET
from rft.storage import files, local


def checkpoint_path(path: Path) -> Path:
    """Find the weights file of `path`: the file itself, or the selected one of a run folder."""
    return path / SELECTED if path.is_dir() else path


def results_path(checkpoint: Path, name: str = filenames.RESULTS) -> Path:
    """Return the path of the counts, or other results, of a run folder or weights file."""
    return checkpoint / name if checkpoint.is_dir() else checkpoint.with_suffix(f".{name}")


def require_no_links(folder: Path) -> None:
    """Check that a run folder has no links through which files would be written or emptied.

    The folder may itself be a link that the user made.

    Raises:
        ValueError: naming the link.
    """
    local.require_own_folder(folder, "--run-dir or --out")
    # checkpoints are the one part that users move to a larger disk
    local.require_no_links(
        folder, [filenames.CHECKPOINTS], "or keep them there with --log.checkpoints"
    )
    logs = folder / filenames.TENSORBOARD
    events = [f"{logs.name}/{path.name}" for path in logs.iterdir()] if logs.is_dir() else []
    # the first entry, checkpoints/, was checked above with its own advice
    local.require_no_links(folder, (*WRITTEN_THROUGH[1:], *events))


def run_of(weights: Path) -> Path | None:
    """Find the run folder that contains a weights file; None for a folder, or a file elsewhere."""
    if not weights.is_file():
        return None
    # a bare name has no parent folders, and a link may lead into a run
    for place in (weights, weights.absolute(), weights.resolve()):
        if place.parent.name == SELECTED.parent.name and not records.is_foreign(place.parents[1]):
            return place.parents[1]
    return None


def weights_record(folder: Path) -> dict[str, str]:
    """Hash the weights files of a complete run, for its record."""
    kept = [path for path in (SELECTED, LAST) if (folder / path).is_file()]
    # both files: merges may take the last weights instead of the selected ones
    return {path.name: files.sha256_file(folder / path) for path in kept}


def require_own_weights(path: Path, weights: Path | None = None, sha256: str = "") -> None:
    """Check that the weights in a run folder are those that its run or merge wrote.

    Nothing is compared for folders of an older rft, which have no record of the hash, for
    unfinished runs, and for weights files outside a run folder.

    Args:
        path: a run folder, or a weights file.
        weights: the file to check; the selected one of a run folder if not given.
        sha256: hash of that file, if it is known.

    Raises:
        ValueError: if the hash differs, config.json and the weights name different recipes, or a
            file of the run is damaged.
    """
    weights = weights or checkpoint_path(path)
    folder = path if path.is_dir() else run_of(path)
    if folder is None or not weights.is_file():
        return
    config = records.find_config(folder)
    made_by = header.read_entries(weights).recipe
    if config is not None and made_by not in (None, config.recipe):
        raise ValueError(
            f"{folder / filenames.CONFIG} names recipe {config.recipe!r}, but its weights were "
            f"made by {made_by!r}; restore {filenames.CONFIG}"
        )
    # also None while a run trains: the hashes are in training.json, its last file
    recorded = recorded_sha256(folder, weights)
    if recorded is None:
        return
    found = sha256 or files.sha256_file(weights)
    if found != recorded:
        raise ValueError(
            f"{weights} was replaced after {folder} was completed: recorded is {recorded[:12]}, "
            f"the file is {found[:12]}; restore it, or import the file into a folder of its own: "
            "rft convert import FILE --out DIR"
        )


def recorded_sha256(folder: Path, weights: Path) -> str | None:
    """Look up the recorded hash of a complete run's weights file; None in runs of an older rft."""
    # a training records hashes in training.json, a merge or import in provenance.json
    training = records.find(folder / filenames.TRAINING, records.Training)
    made = records.find(folder / filenames.PROVENANCE, records.Provenance)
    for record in (training, made):
        if record is not None and (hashes := record.weights_sha256) is not None:
            # a link may have a name of its own
            return hashes.get(weights.name, hashes.get(weights.resolve().name))
    return None


def unfinished(folder: Path) -> str:
    """Describe the progress of a training run that has not ended, such as "step 20 of 100".

    Empty for a run that has ended, for a merged or imported model, and for a weights file outside
    a run folder.

    Raises:
        ValueError: if a file of the run is damaged.
    """
    # a weights file in a run folder has the progress of that run
    folder = run_of(folder) or folder
    config = records.find_config(folder)
    if config is None or not config.is_training or (folder / filenames.TRAINING).exists():
        return ""
    reached = records.find(folder / filenames.PROGRESS, records.Reached)
    return f"step {reached.step} of {reached.of}" if reached else "no step recorded"


def read_results(checkpoint: Path) -> Results | None:
    """Read the counts of a run folder or weights file; None if it was never evaluated.

    The weights may have changed since: see `require_current`.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        return records.find(results_path(checkpoint), Results)
    except ValueError as error:
        raise ValueError(f"{error}; restore it, or delete it and evaluate again") from error


def current_results(checkpoint: Path) -> Results | None:
    """Read the counts of the current weights; None if they were not evaluated.

    Raises:
        ValueError: if the file is damaged.
    """
    results, weights = read_results(checkpoint), checkpoint_path(checkpoint)
    if results is None:
        return None
    if not weights.is_file():
        return results if _is_of_config(checkpoint, results) else None
    return results if results.checkpoint_sha256 == files.sha256_file(weights) else None


def _is_of_config(folder: Path, results: Results) -> bool:
    """Whether counts without weights belong to the average that config.json describes."""
    config = folder / filenames.CONFIG
    if not results.without_weights or not config.is_file():
        return False
    return results.config_sha256 == files.sha256_file(config)


def require_current(checkpoint: Path, results: Results) -> list[str]:
    """Check that counts belong to the current weights.

    Returns:
        A warning if the weights are gone, so that the counts cannot be compared.

    Raises:
        ValueError: with the command that evaluates the model again.
    """
    weights = checkpoint_path(checkpoint)
    if not weights.is_file():
        if not results.without_weights:
            return [f"{weights} is missing, so its results cannot be compared with the weights"]
        if _is_of_config(checkpoint, results):
            return []
        config = checkpoint / filenames.CONFIG
        raise ValueError(
            f"{config} was changed after {results_path(checkpoint)} was written, and it is the "
            "only record of the evaluated average; restore it, or delete the folder and evaluate "
            "again"
        )
    found = files.sha256_file(weights)
    if found == results.checkpoint_sha256:
        return []
    raise ValueError(
        f"{results_path(checkpoint)} is stale: its counts are of weights "
        f"{results.checkpoint_sha256[:12]}, {weights} is {found[:12]}; evaluate it again: "
        f"{evaluation_command(checkpoint, list(results.sets))}"
    )


def evaluation_command(run: Path, sets: Sequence[str] = ()) -> str:
    """Build the command line that evaluates a run folder, with the data root of its config.json.

    Without `sets`, these follow from the training set: for ImageNet its benchmarks, which are the
    default of the command, and for own photos their test set.
    """
    config = records.find_config(run)
    # if config.json has no data root, the user replaces DATA
    data = config.data if config and config.data else "DATA"
    if not sets and config and config.train_set not in ("", TRAIN_SET):
        sets = ["test"]
    words = ["python", "-m", "rft.evaluate", str(run), "--data", data]
    return shlex.join([*words, *(["--sets", *sets] if sets else [])])
