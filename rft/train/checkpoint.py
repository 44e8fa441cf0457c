"""Checkpoints to resume from: atomic, only the newest few kept, loaded without running any code.

A checkpoint holds weights, optimizer state, the step, the best held-out count so far, and what it
must agree with: the run's identity and the data fingerprint. There is no random state in it:
randomness is addressed by step (rft/rng.py). Beside each file lies a record with its hash, written
before the file gets its name: a file whose record does not fit is damaged, and the one before it is
used.

They are written by a thread of their own from a copy in memory, so that training goes on meanwhile.
"""

import errno
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from rft import dist, documents, files
from rft.cli import warn
from rft.clip.classifier import Classifier
from rft.config import repeat_precision
from rft.dist import World
from rft.documents import Count, Sha256, document
from rft.records import RECORD_BYTES, Step


@dataclass(frozen=True)
class Progress:
    """How far a run is and which of its models is the best so far."""

    step: int = 0
    best_step: int = -1
    best_correct: int = -1

    def selecting(self, correct: int) -> "Progress":
        """Return the progress after a held-out count: strictly the best so far is selected."""
        if correct <= self.best_correct:
            return self
        return replace(self, best_step=self.step, best_correct=correct)


@document(name="record")
class Record:
    """What is known of a checkpoint file without reading it."""

    step: Count
    best_step: Step
    bytes: Count
    sha256: Sha256

    @property
    def name(self) -> str:
        """Name of the checkpoint file."""
        return file_name(self.step)


def file_name(step: int) -> str:
    """Return the name of the checkpoint after `step`."""
    return f"step-{step:08d}.pt"


def record_name(step: int) -> str:
    """Return the name of its record."""
    return f"step-{step:08d}.json"


class Store:
    """A folder of checkpoints, on any store that `rft.urls` lets be opened.

    What goes to a remote one is written to the folder `scratch` first.
    """

    def __init__(self, url: str, keep: int, scratch: Path | None = None) -> None:
        self.url = url
        self._keep, self._scratch = keep, scratch

    def write(self, content: dict[str, Any]) -> Record:
        """Write the checkpoint of `content`, then delete those that are not needed any more.

        Raises:
            OSError: if it cannot be written; those before it are whole.
        """
        progress = content["progress"]
        step, url = progress["step"], files.join(self.url, file_name(progress["step"]))
        try:
            with files.publish(url, self._scratch) as path:
                save(content, path)
                record = Record(
                    step=step,
                    best_step=progress["best_step"],
                    bytes=path.stat().st_size,
                    sha256=files.sha256_file(path),
                )
                # a file without its record would be taken for a damaged one
                files.write_json(files.join(self.url, record_name(step)), asdict(record))
        except OSError as error:
            raise OSError(
                f"cannot write checkpoint {url}: {files.reason(error)}. Those before it are whole: "
                "when there is room or the store answers, run the same command again"
            ) from error
        try:
            self._delete_old()
        except OSError as error:
            warn(f"old checkpoints stay: {files.reason(error)}")
        return record

    def steps(self) -> list[int]:
        """Return the steps of the checkpoint files that are there, ascending."""
        parts = [name.removeprefix("step-").split(".") for name in files.names(self.url)]
        return sorted(int(step) for step, *kind in parts if kind == ["pt"] and step.isdecimal())

    def newest_whole(self) -> Record | None:
        """Return the newest checkpoint that is as it was written; None if there is none at all.

        Damaged ones behind it are told of and renamed.

        Raises:
            ValueError: if there are checkpoints and all of them are damaged, or if one cannot be
                read, which says nothing of it.
            OSError: if the store does not answer.
        """
        files.sweep(self.url)
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            damage = self.damage(step)
            if not damage:
                for later, what in damaged.items():
                    url = files.join(self.url, file_name(later))
                    warn(f"{url} is damaged ({what}): renamed to .damaged, one before it is used")
                    files.rename(url, f"{file_name(later)}.damaged")
                return self._record(step)
            damaged[step] = damage
        if damaged:
            raise ValueError(
                f"none of the checkpoints in {self.url} is whole (step {max(damaged)}: "
                f"{damaged[max(damaged)]}); restore one, or use a new run folder to start again"
            )
        return None

    def damage(self, step: int) -> str:
        """Return what is wrong with a checkpoint; empty if it is as it was written.

        Raises:
            ValueError: if it cannot be read.
        """
        if record_name(step) not in files.names(self.url):
            return "its record is missing"
        url = files.join(self.url, record_name(step))
        data = files.read_bytes(url)
        try:
            record = documents.decode(data, Record, url)
        except ValueError:
            record = None
        if record is None or record.step != step:
            return "its record is damaged"
        try:
            with files.local_copy(files.join(self.url, file_name(step))) as path:
                size, digest = path.stat().st_size, files.sha256_file(path)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return files.reason(error)
        if size != record.bytes:
            return f"{size} bytes instead of {record.bytes}"
        return "" if digest == record.sha256 else f"its sha256 is {digest}"

    def load(self, step: int) -> dict[str, Any]:
        """Return the content of a checkpoint, tensors on the CPU.

        Raises:
            ValueError: if it cannot be read.
        """
        with files.local_copy(files.join(self.url, file_name(step))) as path:
            if not path.exists():
                raise ValueError(f"no checkpoint at {path}; do all nodes see the same files?")
            return torch.load(path, map_location="cpu", weights_only=True)

    def _record(self, step: int) -> Record:
        return files.read_document(files.join(self.url, record_name(step)), Record, RECORD_BYTES)

    def _delete_old(self) -> None:
        """Keep the newest few, and the selected model's of each of them."""
        steps = self.steps()
        kept = set(steps[-self._keep :])
        try:
            kept |= {self._record(step).best_step for step in kept}
        except ValueError:
            return  # it is not known what they need
        for step in set(steps) - kept:
            files.remove(files.join(self.url, file_name(step)))
            files.remove(files.join(self.url, record_name(step)))


def save(content: dict[str, Any], path: Path) -> None:
    """Write `content` with torch.

    Raises:
        OSError: if the file system refuses.
    """
    try:
        with path.open("wb") as stream:
            torch.save(content, stream)
    except RuntimeError as error:
        # torch's writer speaks of positions in the file, what the system said is behind it
        cause = error.__context__
        raise (cause if isinstance(cause, OSError) else OSError(str(error))) from error


class Writer:
    """Writes checkpoints while training goes on, one at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def write(
        self, content: dict[str, Any], then: Callable[[Record, dict[str, Any]], None]
    ) -> None:
        """Copy `content` to memory and write it in the background; `then` comes after it.

        Waits for the checkpoint before this one.

        Raises:
            OSError: if that one could not be written.
        """
        self.wait()
        copy = to_cpu(content)

        def work() -> None:
            then(self._store.write(copy), copy)

        self._pending = self._thread.submit(work)

    @property
    def failed(self) -> bool:
        """Whether the checkpoint that was written last could not be; `wait` tells why."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> None:
        """Wait until the checkpoint under way is written.

        Raises:
            OSError: if it could not be.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()


def to_cpu(value: Any) -> Any:
    """Return a copy of nested dicts, lists and tensors whose tensors are on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_cpu(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_cpu(part) for part in value)
    return value


def content(
    student: Classifier,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    must_agree: dict[str, Any],
    donor_pool: int,
) -> dict[str, Any]:
    """Return what a checkpoint holds; its tensors are those in use.

    Args:
        student: the model that learns.
        optimizer: its optimizer.
        progress: how far it is.
        must_agree: what the job that goes on from here must have the same of.
        donor_pool: images that a fill chose from; another number of ranks may change it.
    """
    return {
        "model": student.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
        "must_agree": must_agree,
        "donor_pool": donor_pool,
    }


def resume(
    store: Store,
    world: World,
    student: Classifier,
    optimizer: torch.optim.Optimizer,
    must_agree: dict[str, Any],
    donor_pool: int,
) -> Progress:
    """Load the newest whole checkpoint into `student` and `optimizer`; without one, start at 0.

    Raises:
        ValueError: if it was made by another run, on other data or in another sample order.
    """
    record = dist.from_main(world, dist.on_main(world, store.newest_whole))
    if record is None:
        return Progress()
    saved = store.load(record.step)
    if changed := files.difference(saved["must_agree"], must_agree):
        option = repeat_precision(saved["must_agree"]["config"], must_agree["config"])
        raise ValueError(
            f"{files.join(store.url, record.name)} was made on other data or by another run, this "
            f"one would not go on where that stopped: {'; '.join(changed)}. Restore the data, "
            f"repeat its options{option} or use a new run folder"
        )
    student.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    if world.is_main:
        print(f"going on after step {record.step}", flush=True)
        if saved["donor_pool"] != donor_pool:
            print(
                f"fills choose from {donor_pool} images now, from {saved['donor_pool']} before: "
                "the batches stay the same, the counterfactuals do not (a run that begins "
                "with --method.donors global keeps them)",
                flush=True,
            )
    return Progress(**saved["progress"])
