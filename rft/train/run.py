"""The run folder during training: its identity, its lock, and the record of its end.

config.json holds the identity, which decides whether a command may resume the folder's run. File
names are in rft/runs/filenames.py.
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
    """One run on disk; only the main rank writes it, while it holds the lock."""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.run)
        elsewhere = config.log.checkpoints
        # a subfolder per run: runs with the same option, as in a sweep, must not share checkpoints
        self.checkpoints = (
            files.join(elsewhere, self.path.resolve().name)
            if elsewhere
            else str(self.path / filenames.CHECKPOINTS)
        )
        self._config = config

    @contextlib.contextmanager
    def taken(self, world: World, request: StopRequest) -> Iterator[None]:
        """Lock the folder for the length of the body, for all ranks together.

        A job that lost its node may still write for a while, so this waits for the lock.

        Raises:
            ValueError: if it belongs to a different configuration, or another job holds it.
        """
        # not thread_local, because it is acquired in a thread while this rank answers the others
        lock = filelock.FileLock(self.path / filenames.LOCK, thread_local=False)

        def take() -> None:
            self.path.mkdir(parents=True, exist_ok=True)
            require_no_links(self.path)
            if elsewhere := self._config.log.checkpoints:
                fs, folder = files.open_store(elsewhere)
                if isinstance(fs, LocalFileSystem):
                    local.require_no_links(Path(folder), [self.path.resolve().name])
            self._acquire(lock, request)
            # under the lock, because the job before may have changed the folder
            check_identity(self._config)
            # under the lock, because it would delete files that another job is still writing
            files.sweep(str(self.path))

        try:
            dist.on_main(world, take)
            yield
        finally:
            # does nothing if the lock is not held: on other ranks, and after an error
            lock.release()

    def _acquire(self, lock: filelock.FileLock, request: StopRequest) -> None:
        patience = self._config.cluster.lock_wait
        # try at once first, so that only a real wait is logged
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(timeout=0)
            return
        if patience and not request.reason:
            log.info(f"waiting up to {patience:g} s for another job to release {self.path}")
        try:
            # filelock raises its Timeout for a cancelled wait too
            lock.acquire(patience, poll_interval=0.5, cancel_check=lambda: bool(request.reason))
        except filelock.Timeout as error:
            if request.reason:
                raise ValueError(
                    f"stopped ({request.reason}) while another job was writing {self.path}; rerun "
                    "the same command"
                ) from error
            raise ValueError(
                f"another job is writing {self.path} and did not release it within {patience:g} s; "
                "wait for it or stop it. If there is none, a lost machine left the lock: delete "
                f"{self.path / filenames.LOCK} (docs/cluster.md#troubleshooting)"
            ) from error

    def write_records(self) -> None:
        """Write configuration and provenance; call it when nothing can refuse the run any more.

        Before that, the folder may hold a run on other data, whose records must stay.
        """
        files.write_json(str(self.path / filenames.CONFIG), self._config.to_dict())
        files.write_json(str(self.path / filenames.PROVENANCE), files.provenance())

    def note_progress(self, record: Record, total: int) -> None:
        """Record the progress of the run, after a checkpoint is safely written."""
        reached = Reached(step=record.step, of=total, checkpoint=record.name, sha256=record.sha256)
        files.write_json(str(self.path / filenames.PROGRESS), asdict(reached))

    def require_there(self) -> None:
        """Check that the folder was not deleted or emptied during training.

        Writing into it would create a new folder with half of a run.

        Raises:
            ValueError: if it was.
        """
        if not (self.path / filenames.CONFIG).exists():
            raise ValueError(vanished(self.path))


def vanished(path: Path, how: str = "was deleted, emptied or moved") -> str:
    """Format the error for a run folder, or a file in it, that vanished during training."""
    return (
        f"{path} {how} while the run was training; nothing more is written. Restore it to resume "
        "from the newest checkpoint, or delete the rest and run the same command to start anew"
    )


def check_identity(config: Config) -> None:
    """Check that the run folder is new or has the same configuration.

    An unresolved precision `auto` agrees with any.

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
    # A run that stopped before its first checkpoint has nothing to lose. If the folder was lost but
    # its checkpoints are stored elsewhere, they are checked when loaded.
    signs = (filenames.TRAINING, filenames.PROGRESS, f"{filenames.CHECKPOINTS}/*.pt")
    if not any(any(folder.glob(sign)) for sign in signs):
        return
    old, new = load_config(folder).identity(), config.identity()
    if config.precision == "auto":
        new["precision"] = old["precision"]
    if changed := files.difference(old, new):
        option = repeat_precision(old, new) + small.repeat_numbers(old, new)
        raise ValueError(
            f"{config.run} holds a run with a different configuration: {'; '.join(changed)}. "
            f"Repeat its options to resume it{option}, or choose another --run-dir "
            "(docs/training.md#stop-and-resume)"
        )


def require_no_data(folder: Path) -> None:
    """Check that a folder without a run is neither a data root nor a packed set.

    Raises:
        ValueError: naming a set in it.
    """
    for manifest in sorted((*folder.glob(MANIFEST), *folder.glob(f"*/{MANIFEST}"))):
        # a manifest.json alone may belong to any program
        if manifest.with_name(INDEX).exists():
            raise ValueError(
                f"--run-dir {folder} holds packed data ({manifest.parent}); name a separate folder "
                "for the run"
            )


class Finished(NamedTuple):
    """A complete run."""

    record: Training
    """Its training.json."""
    uncompared: str
    """Why its training set could not be compared with the one named now; empty if it was."""


def finished(config: Config) -> Finished | None:
    """Check whether this run is complete in its folder; None if it is not.

    With an unresolved precision `auto`, a complete run in any precision counts as this one, because
    nothing is left to compute. Only the manifest of the data is read; if the set is gone, the run
    still counts as finished.

    Raises:
        ValueError: if the folder holds a different run, complete or not, a run trained on a
            different set, weights of a different run, or a damaged training.json.
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
    if trained_on is None:  # written by an older rft
        return Finished(record, "")
    try:
        now = Manifest.load(url).sha256
    except (ValueError, OSError) as error:
        return Finished(record, str(error))
    if now != trained_on:
        raise ValueError(
            f"{config.run} is a finished run that was trained on other data than {url} holds now: "
            f"the manifest's hash was {trained_on[:12]} and is now {now[:12]}. Restore the data, "
            "or choose another --run-dir (docs/training.md#stop-and-resume)"
        )
    return Finished(record, "")
