"""The run folder: what a run is, what it did, and a lock so that only one job writes it.

config.json (its hash is the run's identity), metrics.jsonl, tensorboard/, checkpoints/,
training.json (written last: the run is finished), results.json (rft.evaluate), gallery.npz,
provenance.json.
"""

from pathlib import Path
from typing import Any, Self

import filelock

from rft import files
from rft.config import Config


class RunFolder:
    """One run on disk, opened by the main rank for as long as it trains."""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.run)
        self.checkpoints = self.path / "checkpoints"
        self._config = config
        self._lock = filelock.FileLock(self.path / ".lock")

    def __enter__(self) -> Self:
        """Take the folder.

        Raises:
            ValueError: if it belongs to another configuration, or another job is in it.
        """
        check_identity(self._config)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise ValueError(
                f"another job is writing {self.path}; wait for it or stop it"
            ) from error
        files.write_json(str(self.path / "config.json"), self._config.to_dict())
        files.write_json(str(self.path / "provenance.json"), files.provenance())
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def finish(self, summary: dict[str, Any]) -> None:
        """Record that the run is complete."""
        files.write_json(str(self.path / "training.json"), summary)


def check_identity(config: Config) -> None:
    """Check that the run folder is new or was made by the same configuration.

    Raises:
        ValueError: with the differences.
    """
    folder = Path(config.run)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--run-dir {folder} is a file; choose another")
    path = folder / "config.json"
    if not path.exists():
        if (folder / "checkpoints").exists():
            raise ValueError(f"{folder} has checkpoints but no config.json; use another folder")
        return
    document = files.read_json(str(path))
    if {"merged_from", "imported_from"} & document.keys():
        raise ValueError(f"{folder} holds a merged or imported model; choose another --run-dir")
    # a run that stopped before its first checkpoint left nothing that another could spoil
    if not (folder / "training.json").exists() and not any(folder.glob("checkpoints/*.pt")):
        return
    old = Config.from_dict(document).identity()
    if changed := files.difference(old, config.identity()):
        raise ValueError(
            f"{config.run} holds a run with another configuration: {'; '.join(changed)}. "
            "Repeat its options to resume it, or choose another --run-dir"
        )


def is_finished(config: Config) -> bool:
    """Whether the run folder holds this very run, complete.

    Raises:
        ValueError: if it holds another run, complete or not.
    """
    check_identity(config)
    return (Path(config.run) / "training.json").exists()
