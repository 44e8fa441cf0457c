"""The files of a run folder that several commands read: selected weights, state, results.

Numbers belong to the weights they were counted with. results.json therefore carries the weights'
hash, and nothing reads a count without comparing it. No torch: the report uses this too.
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
    """Return the weights file meant by `path`: itself, or the selected one of a run folder."""
    return path / SELECTED if path.is_dir() else path


def results_path(checkpoint: Path, name: str = filenames.RESULTS) -> Path:
    """Return where the counts, or other results, of a run folder or weights file are kept."""
    return checkpoint / name if checkpoint.is_dir() else checkpoint.with_suffix(f".{name}")


def require_no_links(folder: Path) -> None:
    """Check that nothing is written or emptied through a link in a run folder.

    The folder may be a link of the user's own.

    Raises:
        ValueError: naming the link.
    """
    local.require_own_folder(folder, "--run-dir or --out")
    # checkpoints are the one part that people move to a larger disk
    local.require_no_links(
        folder, [filenames.CHECKPOINTS], "or keep them there with --log.checkpoints"
    )
    logs = folder / filenames.TENSORBOARD
    events = [f"{logs.name}/{path.name}" for path in logs.iterdir()] if logs.is_dir() else []
    # the first of them, checkpoints/, was checked above with its own advice
    local.require_no_links(folder, (*WRITTEN_THROUGH[1:], *events))


def run_of(weights: Path) -> Path | None:
    """Return the run folder that a weights file lies in; None for a folder, or a file elsewhere."""
    if not weights.is_file():
        return None
    # a bare name has no folders of its own, and a link may lead into a run
    for place in (weights, weights.absolute(), weights.resolve()):
        if place.parent.name == SELECTED.parent.name and not records.is_foreign(place.parents[1]):
            return place.parents[1]
    return None


def weights_record(folder: Path) -> dict[str, str]:
    """Return what the record of a complete run says of its weights: the hash of each file."""
    kept = [path for path in (SELECTED, LAST) if (folder / path).is_file()]
    # both: merges may take the last weights instead of the selected ones
    return {path.name: files.sha256_file(folder / path) for path in kept}


def require_own_weights(path: Path, weights: Path | None = None, sha256: str = "") -> None:
    """Check that weights in a run folder are those that its run or merge left there.

    Folders of an older rft recorded nothing and are not compared; neither are unfinished runs and
    weights files outside a run folder.

    Args:
        path: a run folder, or a weights file.
        weights: the file that is meant; the selected one of a run folder if not given.
        sha256: hash of that file, where it is known.

    Raises:
        ValueError: if they are not, config.json names a recipe and the weights a different one, or
            a file of the run is damaged.
    """
    weights = weights or checkpoint_path(path)
    folder = path if path.is_dir() else run_of(path)
    if folder is None or not weights.is_file():
        return
    config = records.find_config(folder)
    made_by = header.read_entries(weights).recipe
    if config is not None and made_by not in (None, config.recipe):
        raise ValueError(
            f"{folder / filenames.CONFIG} names recipe {config.recipe!r}, its weights were made by "
            f"{made_by!r}; restore {filenames.CONFIG}"
        )
    # None, too, while a run trains: the hashes come with training.json, its last file
    recorded = recorded_sha256(folder, weights)
    if recorded is None:
        return
    found = sha256 or files.sha256_file(weights)
    if found != recorded:
        raise ValueError(
            f"{weights} are not the weights that {folder} was completed with: recorded is "
            f"{recorded[:12]}, the file is {found[:12]}; restore them, or import the file into a "
            "folder of its own: python -m rft.convert import FILE --out DIR"
        )


def recorded_sha256(folder: Path, weights: Path) -> str | None:
    """Return the hash that a complete run recorded of a weights file; None of an older rft's."""
    # a training records them in training.json, a merge or import in provenance.json
    training = records.find(folder / filenames.TRAINING, records.Training)
    made = records.find(folder / filenames.PROVENANCE, records.Provenance)
    for record in (training, made):
        if record is not None and (hashes := record.weights_sha256) is not None:
            # a link may have a name of its own
            return hashes.get(weights.name, hashes.get(weights.resolve().name))
    return None


def unfinished(folder: Path) -> str:
    """Return how far a training run is that has not ended, such as "step 20 of 100".

    Empty for a run that ended, for a merged or imported model, and for a weights file outside a
    run folder.

    Raises:
        ValueError: if a file of the run is damaged.
    """
    # a file in a run folder is as far as that run
    folder = run_of(folder) or folder
    config = records.find_config(folder)
    if config is None or not config.is_training or (folder / filenames.TRAINING).exists():
        return ""
    reached = records.find(folder / filenames.PROGRESS, records.Reached)
    return f"step {reached.step} of {reached.of}" if reached else "no step recorded"


def read_results(checkpoint: Path) -> Results | None:
    """Read the counts of a run folder or weights file; None if it was never evaluated.

    They may be of other weights than those that exist now: see `require_current`.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        return records.find(results_path(checkpoint), Results)
    except ValueError as error:
        raise ValueError(f"{error}; restore it, or delete it and evaluate again") from error


def current_results(checkpoint: Path) -> Results | None:
    """Read the counts of the weights as they are now; None if there are none of these weights.

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
    """Whether counts without weights are of the average that config.json describes."""
    config = folder / filenames.CONFIG
    if not results.without_weights or not config.is_file():
        return False
    return results.config_sha256 == files.sha256_file(config)


def require_current(checkpoint: Path, results: Results) -> list[str]:
    """Check that counts belong to the weights as they are now.

    Returns:
        A warning if the weights are gone, so that this cannot be known.

    Raises:
        ValueError: with the command that counts again.
    """
    weights = checkpoint_path(checkpoint)
    if not weights.is_file():
        if not results.without_weights:
            return [f"{weights} is missing: whether the results are of these weights is not known"]
        if _is_of_config(checkpoint, results):
            return []
        config = checkpoint / filenames.CONFIG
        raise ValueError(
            f"{config} was changed since {results_path(checkpoint)} was written, and without "
            "weights only it says which model was counted; restore it, or delete the folder and "
            "evaluate again"
        )
    found = files.sha256_file(weights)
    if found == results.checkpoint_sha256:
        return []
    raise ValueError(
        f"{results_path(checkpoint)} is stale: it was counted with weights "
        f"{results.checkpoint_sha256[:12]}, {weights} is {found[:12]}; evaluate it again: "
        f"{evaluation_command(checkpoint, list(results.sets))}"
    )


def evaluation_command(run: Path, sets: Sequence[str] = ()) -> str:
    """Return the command line that evaluates a run folder, with the data that it names.

    Without sets, those of the data that the run was trained on: ImageNet has its benchmarks, which
    are the command's default, and one's own photos their test set.
    """
    config = records.find_config(run)
    # without a data root in config.json, DATA is for the user to fill in
    data = config.data if config and config.data else "DATA"
    if not sets and config and config.train_set not in ("", TRAIN_SET):
        sets = ["test"]
    words = ["python", "-m", "rft.evaluate", str(run), "--data", data]
    return shlex.join([*words, *(["--sets", *sets] if sets else [])])
