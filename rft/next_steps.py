"""The commands that follow a training, a merge, an evaluation or a report, ready to paste."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from rft import cli
from rft.config import settings
from rft.runs import filenames, records
from rft.runs.folder import read_results
from rft.sets import BENCHMARKS, TEST_SETS, TRAIN_SET
from rft.shards.folder import MANIFEST
from rft.shards.root import packed_sets
from rft.storage import files


def evaluation(
    models: Sequence[Path], data: str, train_set: str = TRAIN_SET, *, ranks: int = 1
) -> str:
    """Format the `next:` lines that evaluate models on the test sets beside their training set.

    Args:
        models: run folders or weights files.
        data: their data root; empty if unknown.
        train_set: the packed set they were trained on.
        ranks: number of processes that share the work.
    """
    words: list[object] = ["-m", "rft.evaluate", *models, "--data", data or "DATA"]
    unknown = {} if data else {"DATA": "folder or URL below which the packed sets lie"}
    tests = test_sets(data, train_set)
    # of other names than expected
    tests = tests or _other_sets(data, train_set)
    # those are rft.evaluate's default
    if tests != TEST_SETS:
        words += ["--sets", *(tests or ["SET"])]
    if not tests:
        unknown["SET"] = "packed set of test images; no set but the training set was found"
    return cli.next_step(words, ranks=ranks, unknown=unknown)


def test_sets(data: str, train_set: str) -> tuple[str, ...]:
    """Find the test sets in a data root that belong to a training set.

    ImageNet has its benchmarks; your own set has one test set (tools/shard_folder.py). If the data
    root is unknown or cannot be read, all of them are returned.
    """
    known = TEST_SETS if train_set in BENCHMARKS else ("test",)
    if not data:
        return known
    try:
        # some benchmarks may not be packed yet, and evaluation refuses missing ones
        return tuple(name for name in known if files.exists(files.join(data, name, MANIFEST)))
    except (OSError, ValueError):  # e.g. missing credentials, or the network is down
        return known


def _other_sets(data: str, train_set: str) -> tuple[str, ...]:
    """List the sets of a data root besides the training set; none if the store cannot list them."""
    with contextlib.suppress(OSError, ValueError):
        return tuple(name for name in packed_sets(data) if name not in (train_set, TRAIN_SET))
    return ()


def report(runs: Sequence[Path], data: str) -> str:
    """Format the `next:` line that reports evaluated runs together with their other seeds."""
    words = ["-m", "rft.report", *with_seeds(runs, filenames.RESULTS), "--out", "report"]
    return cli.next_step([*words, "--data", data])


def use(run: str) -> str:
    """Format the next commands for a model: predict new images, and export it."""
    unknown = {"IMAGE...": "images, or folders of them"}
    words = ["-m", "rft.predict", run, "IMAGE...", "--html", "predictions.html"]
    export = ["-m", "rft.convert", "export", run, "--to", "open-clip", "--out", "model"]
    lines = cli.next_step(words, unknown=unknown), cli.next_step(export, label="or")
    return "\n".join(lines)


def after_choice(
    chosen: Path, models: Sequence[Path], data: str, save: Path, merge: Sequence[str] = ()
) -> str:
    """Format the lines that export a chosen model and report on all candidates.

    Args:
        chosen: its run folder.
        models: the run folders of all candidates.
        data: their data root.
        save: the record of the choice.
        merge: words of the command that writes the weights first, if they were never written.
    """
    export = ["-m", "rft.convert", "export", chosen, "--to", "open-clip", "--out", "model"]
    report = ["-m", "rft.report", *models, "--out", "report", "--data", data, "--chosen", save]
    evaluated = all((model / filenames.RESULTS).is_file() for model in models)
    then = "then" if evaluated else "then, after rft evaluate of the same models"
    lines = [cli.next_step(words) for words in [merge] if words]
    lines.append(cli.next_step(export, label="then" if merge else "next"))
    return "\n".join([*lines, cli.next_step(report, label=then)])


def with_seeds(runs: Sequence[Path], done: str) -> list[Path]:
    """Add to run folders the sibling folders with other seeds of the same runs.

    Args:
        runs: run folders.
        done: JSON file that a finished run has: training.json or results.json. The data that it
            names must be the same for all seeds of a run.
    """
    found = {run.resolve(): run for run in runs}
    seeds = {_seed(run, done) for run in runs}
    for run in runs:
        for beside in sorted(run.parent.iterdir()):
            seed = _seed(beside, done)
            # equal except for the seed; None stands for an unfinished run
            same = seed is not None and any(seed[1:] == known[1:] for known in seeds if known)
            # one folder per seed: a report refuses two folders of one seed
            if same and seed not in seeds and beside.resolve() not in found:
                found[beside.resolve()] = beside
                seeds.add(seed)
    return list(found.values())


def _seed(run: Path, done: str) -> tuple[int, str] | None:
    """Read a run's seed and the key that all its seeds share; None if it is not a finished run."""
    try:
        config = records.read_config(run)
        if done == filenames.RESULTS:
            ready = read_results(run)
            data = ready and sorted((name, c.manifest_sha256) for name, c in ready.sets.items())
        else:
            ready = records.find(run / filenames.TRAINING, records.Training)
            data = ready and ready.manifest_sha256
    except (OSError, ValueError):  # a sibling folder may be anything, or damaged
        return None
    # as text, because dicts are not hashable
    return (config.seed, repr((settings(config.whole), data))) if ready else None
