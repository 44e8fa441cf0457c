"""The run folder while a training uses it: its identity, its lock, and the record of its end.

config.json holds the identity; whether a folder's run may be resumed by another command is decided
by it. The names of all files: rft/runs/filenames.py.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import filelock
from fsspec.implementations.local import LocalFileSystem

from rft import dist, small
from rft.config import Config, load_config, repeat_precision
from rft.dist import World
from rft.runs import filenames, records
from rft.runs.folder import require_no_links, require_own_weights
from rft.runs.records import Reached, Training
from rft.shards.folder import INDEX, MANIFEST
from rft.shards.manifest import Manifest
from rft.storage import files, local
from rft.train.checkpoint import Record
from rft.train.stop import StopRequest

log = logging.getLogger(__name__)


class RunFolder:
    """One run on disk; the main rank alone writes it, for as long as it holds the lock."""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.run)
        elsewhere = config.log.checkpoints
        # runs that share their options, as those of a sweep, must not share their checkpoints
        self.checkpoints = (
            files.join(elsewhere, self.path.resolve().name)
            if elsewhere
            else str(self.path / filenames.CHECKPOINTS)
        )
        self._config = config

    @contextlib.contextmanager
    def taken(self, world: World, request: StopRequest) -> Iterator[None]:
        """Hold the folder for the length of the body, on all ranks together.

        A job whose node was lost may still write it for a while: wait for that.

        Raises:
            ValueError: if it belongs to a different configuration, or a different job is in it.
        """
        # not thread_local: it is taken in a thread, while this rank speaks to the others
        lock = filelock.FileLock(self.path / filenames.LOCK, thread_local=False)

        def take() -> None:
            self.path.mkdir(parents=True, exist_ok=True)
            require_no_links(self.path)
            if elsewhere := self._config.log.checkpoints:
                fs, folder = files.open_store(elsewhere)
                if isinstance(fs, LocalFileSystem):
                    local.require_no_links(Path(folder), [self.path.resolve().name])
            self._acquire(lock, request)
            # not before: what was in the folder until now may be another run
            check_identity(self._config)
            # only under the lock: it would delete what a job that is still here is writing
            files.sweep(str(self.path))
            files.write_json(str(self.path / filenames.CONFIG), self._config.to_dict())
            files.write_json(str(self.path / filenames.PROVENANCE), files.provenance())

        try:
            dist.on_main(world, take)
            yield
        finally:
            # does nothing where it was not taken: on the other ranks, and after an error
            lock.release()

    def _acquire(self, lock: filelock.FileLock, request: StopRequest) -> None:
        patience = self._config.cluster.lock_wait
        # at once first: only a real wait is worth a line
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(timeout=0)
            return
        if patience and not request.reason:
            log.info(f"waiting up to {patience:g} s for another job to leave {self.path}")
        try:
            # filelock raises its Timeout for a cancelled wait too
            lock.acquire(patience, poll_interval=0.5, cancel_check=lambda: bool(request.reason))
        except filelock.Timeout as error:
            if request.reason:
                raise ValueError(
                    f"stopped ({request.reason}) while another job was writing {self.path}; run "
                    "the same command again"
                ) from error
            raise ValueError(
                f"another job is writing {self.path} and did not leave within {patience:g} s; wait "
                "for it or stop it. If there is none, a lost machine left its lock: delete "
                f"{self.path / filenames.LOCK}"
            ) from error

    def note_progress(self, record: Record, total: int) -> None:
        """Record how far the run is, after a checkpoint is safe."""
        reached = Reached(step=record.step, of=total, checkpoint=record.name, sha256=record.sha256)
        files.write_json(str(self.path / filenames.PROGRESS), asdict(reached))

    def require_there(self) -> None:
        """Check that the folder was not deleted or emptied while its run trains.

        Writing into it would make a new one with half of a run.

        Raises:
            ValueError: if it was.
        """
        if not (self.path / filenames.CONFIG).exists():
            raise ValueError(vanished(self.path))


def vanished(path: Path, how: str = "was deleted, emptied or moved") -> str:
    """Make the error message for a run folder, or a file of it, that vanished in training."""
    return (
        f"{path} {how} while the run was training; nothing more is written. Restore it to resume "
        "from the newest checkpoint, or delete what is left and run the same command to start anew"
    )


def check_identity(config: Config) -> None:
    """Check that the run folder is new or was made by the same configuration.

    A precision that is still `auto` agrees with any.

    Raises:
        ValueError: with the differences.
    """
    folder = Path(config.run)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--run-dir {folder} is a file; choose another")
    path = folder / filenames.CONFIG
    if not path.exists():
        if any(folder.glob(f"{filenames.CHECKPOINTS}/*")):
            raise ValueError(
                f"{folder} has checkpoints but no {filenames.CONFIG}; use another folder"
            )
        require_no_data(folder)
        return
    if records.read_config(folder).is_derived:
        raise ValueError(f"{folder} holds a merged or imported model; choose another --run-dir")
    # a run that stopped before its first checkpoint left nothing that another could spoil;
    # checkpoints that lie elsewhere, of a folder that was lost, are checked when they are loaded
    signs = (filenames.TRAINING, filenames.PROGRESS, f"{filenames.CHECKPOINTS}/*.pt")
    if not any(any(folder.glob(sign)) for sign in signs):
        return
    old, new = load_config(folder).identity(), config.identity()
    if config.precision == "auto":
        new["precision"] = old["precision"]
    if changed := files.difference(old, new):
        option = repeat_precision(old, new) + small.repeat_numbers(old, new)
        raise ValueError(
            f"{config.run} holds a run with another configuration: {'; '.join(changed)}. "
            f"Repeat its options to resume it{option}, or choose another --run-dir"
        )


def require_no_data(folder: Path) -> None:
    """Check that a folder without a run is no data root and no packed set.

    Raises:
        ValueError: naming a set in it.
    """
    for manifest in sorted((*folder.glob(MANIFEST), *folder.glob(f"*/{MANIFEST}"))):
        # a manifest.json alone may be that of any program
        if manifest.with_name(INDEX).exists():
            raise ValueError(
                f"--run-dir {folder} holds packed data ({manifest.parent}); name a folder of the "
                "run's own"
            )


class Finished(NamedTuple):
    """A run that is complete."""

    record: Training
    """Its training.json."""
    uncompared: str
    """Why its training set could not be compared with the one that is named now, if so."""


def finished(config: Config) -> Finished | None:
    """Look whether this very run is complete in its folder; None if it is not.

    Where the precision is still `auto`, a complete run in any precision is this one: nothing is
    left to compute. Of the data, only the manifest is read; a set that is gone leaves the run as
    finished as it was.

    Raises:
        ValueError: if it holds another run, complete or not, one that was trained on another set,
            weights that are not the run's, or a damaged training.json.
    """
    check_identity(config)
    path = Path(config.run) / filenames.TRAINING
    try:
        record = records.find(path, records.Training)
    except ValueError as error:
        raise ValueError(
            f"{error}. Restore it, or delete it and run the same command to finish the run from "
            "its newest checkpoint"
        ) from error
    if record is None:
        return None
    require_own_weights(path.parent)
    trained_on, url = record.manifest_sha256, files.join(config.data, config.train_set)
    if trained_on is None:  # an older rft's
        return Finished(record, "")
    try:
        now = Manifest.load(url).sha256
    except (ValueError, OSError) as error:
        return Finished(record, str(error))
    if now != trained_on:
        raise ValueError(
            f"{config.run} is a finished run that was trained on other data than {url} holds now: "
            f"the manifest's hash was {trained_on[:12]}, it is {now[:12]}. Restore the data, "
            "or choose another --run-dir"
        )
    return Finished(record, "")
