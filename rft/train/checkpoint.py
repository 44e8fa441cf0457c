"""Checkpoints to resume from: written atomically, only the newest few kept, read as untrusted.

A checkpoint holds weights, optimizer state, the step, the best held-out count so far, and the
values that must agree on resume: the run's identity and the data fingerprint. Weights are those of
the student, of a trained text tower and of a moving teacher. No random state is stored: randomness
is addressed by step (rft/rng.py). Next to each file is a record with its hash, written before the
file gets its final name. A file that does not match its record is damaged, and the checkpoint
before it is used. The record only detects accidental damage: whoever can write the file can write
the record too. The content is therefore checked against the resuming run before any of it is used.

A separate thread writes them from a copy in memory, while training continues.
"""

import errno
import logging
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn

from rft import dist
from rft.clip import unpickle
from rft.clip.classifier import Classifier
from rft.config import completed, repeat_precision
from rft.dist import World
from rft.runs.records import RECORD_BYTES, Step
from rft.storage import documents, files, local
from rft.storage.documents import Count, Sha256, document
from rft.text import printable
from rft.train import anchored
from rft.train.anchored import Anchored
from rft.train.kernels import Choice

# [0-9], because \d matches digits of every script; 16 digits hold the largest step, 2**53
FILE_NAME = re.compile(r"step-([0-9]{8,16})\.pt")
NONE: Mapping[str, nn.Module] = MappingProxyType({})
MOST_CHANGED = 5  # differences that an error lists

log = logging.getLogger(__name__)


@document(name="progress")
class Progress:
    """The step that a run has reached, and its best model so far."""

    step: Count = 0
    # both -1 until a model is selected
    best_step: Step = -1
    best_correct: Step = -1

    def __post_init__(self) -> None:
        if self.best_step > self.step:
            raise ValueError(f"best_step is {self.best_step}, after step {self.step}")
        if (self.best_step < 0) != (self.best_correct < 0):
            raise ValueError("best_step and best_correct must both be set or both be -1")

    def selecting(self, correct: int) -> "Progress":
        """Add a held-out count: the model is selected if the count is strictly the best so far."""
        if correct <= self.best_correct:
            return self
        return replace(self, best_step=self.step, best_correct=correct)


@document(name="record")
class Record:
    """Facts about a checkpoint file, known without reading it."""

    step: Count
    best_step: Step
    bytes: Count
    sha256: Sha256

    @property
    def name(self) -> str:
        """Name of the checkpoint file."""
        return file_name(self.step)


def file_name(step: int) -> str:
    """File name of the checkpoint after `step`, zero-padded so that listings are in order."""
    return f"step-{step:08d}.pt"


def record_name(step: int) -> str:
    """File name of that checkpoint's record, in the same folder."""
    return f"step-{step:08d}.json"


class Store:
    """A folder of checkpoints, on any store that `rft.storage.urls` allows.

    Files for a remote store are first written to the folder `scratch`.
    """

    def __init__(self, url: str, keep: int, scratch: Path | None = None) -> None:
        self.url = url
        self._keep, self._scratch = keep, scratch

    def write(self, content: dict[str, Any]) -> Record:
        """Write the checkpoint of `content`, then delete those no longer needed.

        Raises:
            OSError: if it cannot be written; earlier checkpoints stay intact.
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
                # the record first: a file without its record would count as damaged
                files.write_json(files.join(self.url, record_name(step)), asdict(record))
        except OSError as error:
            raise OSError(
                f"cannot write checkpoint {url}: {files.reason(error)}. Earlier checkpoints are "
                "intact: free space or wait for the store, then run the same command to resume"
            ) from error
        try:
            self._delete_old()
        except OSError as error:
            log.warning(f"old checkpoints were not deleted: {files.reason(error)}")
        return record

    def steps(self) -> list[int]:
        """List the steps whose checkpoint files exist, intact or not, ascending."""
        found = map(FILE_NAME.fullmatch, files.names(self.url))
        steps = {match[0]: int(match[1]) for match in found if match}
        # a name with more zeros than ours would be a second name of one step
        return sorted(step for name, step in steps.items() if name == file_name(step))

    def newest_whole(self) -> Record | None:
        """Find the checkpoint to resume from: the newest intact one, None if there are none.

        Newer, damaged ones are renamed with a warning.

        Raises:
            ValueError: if there are checkpoints but all are damaged, or if one cannot be read now,
                which does not mean that it is damaged.
            OSError: if the store does not answer, or the new name of a damaged one is a folder.
        """
        # safe, because the caller holds the run folder's lock, so nothing else writes here
        files.sweep(self.url)
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            damage = self.damage(step)
            if not damage:
                # only after an intact one is found: if all are damaged, all keep their names
                for later, what in damaged.items():
                    url = files.join(self.url, file_name(later))
                    files.rename(url, f"{file_name(later)}.damaged")
                    log.warning(
                        f"{url} is damaged ({what}): renamed to .damaged, using an earlier one"
                    )
                return self.record(step)
            damaged[step] = damage
        if damaged:
            raise ValueError(
                f"none of the checkpoints in {self.url} is intact (step {max(damaged)}: "
                f"{damaged[max(damaged)]}); restore one, or start anew in a new run folder"
            )
        return None

    def damage(self, step: int) -> str:
        """Compare a checkpoint with its record and describe the damage; empty if it is intact.

        Raises:
            ValueError: if it cannot be read.
        """
        if record_name(step) not in files.names(self.url):
            return "its record is missing"
        url = files.join(self.url, record_name(step))
        # outside the try: a record that cannot be read now is not necessarily damaged
        data = files.read_bytes(url, RECORD_BYTES)
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
            # EIO means that the disk lost the bytes; other errors, such as permissions, do not
            if error.errno != errno.EIO:
                raise
            return files.reason(error)
        if size != record.bytes:
            return f"{size} bytes instead of {record.bytes}"
        return "" if digest == record.sha256 else f"its sha256 is {digest}"

    def record(self, step: int) -> Record:
        """Read the record of a checkpoint.

        Raises:
            ValueError: if it cannot be read, or is damaged.
        """
        return files.read_document(files.join(self.url, record_name(step)), Record, RECORD_BYTES)

    def _delete_old(self) -> None:
        """Delete all but the newest few and the checkpoints of the models that these selected."""
        steps = self.steps()
        kept = set(steps[-self._keep :])
        try:
            kept |= {self.record(step).best_step for step in kept}
        except ValueError:
            return  # without the records it is unknown which ones are needed
        for step in set(steps) - kept:
            # the file first: without its record it would count as damaged
            files.remove(files.join(self.url, file_name(step)))
            files.remove(files.join(self.url, record_name(step)))


def save(content: dict[str, Any], path: Path) -> None:
    """Write `content` with torch.

    Raises:
        OSError: if the file system refuses.
    """
    try:
        with local.writer(path) as stream:
            torch.save(content, stream)
    except RuntimeError as error:
        # torch's error only names file positions; the system's error is its context
        cause = error.__context__
        raise (cause if isinstance(cause, OSError) else OSError(str(error))) from error


class Writer:
    """Writes checkpoints in the background, one at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def write(
        self, content: dict[str, Any], then: Callable[[Record, dict[str, Any]], None]
    ) -> None:
        """Copy `content` to memory, write it in the background, then call `then`.

        Waits for the previous checkpoint first.

        Raises:
            OSError: if the previous one could not be written.
        """
        self.wait()
        copy = to_cpu(content)

        def work() -> None:
            then(self._store.write(copy), copy)

        self._pending = self._thread.submit(work)

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint could not be written; `wait` raises the reason."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> None:
        """Wait until the checkpoint in progress is written.

        Raises:
            OSError: if it could not be.
        """
        if self._pending is not None:
            # cleared first, so that a failure is raised only once
            pending, self._pending = self._pending, None
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # waits, so that a checkpoint in progress is finished even if training failed
        self._thread.shutdown()


def to_cpu(value: Any) -> Any:
    """Copy nested dicts, lists and tensors to the CPU, so that later steps do not change them."""
    if isinstance(value, Tensor):
        # copy=True: on a CPU, `to` would return the same tensor, which the next step changes
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
    kernels: Choice,
    others: Mapping[str, nn.Module] = NONE,
) -> dict[str, Any]:
    """Collect the content of a checkpoint; its tensors are in use and must be copied.

    Args:
        student: the model that learns.
        optimizer: its optimizer.
        progress: the step reached, and the best model.
        must_agree: values that must be equal in the job that resumes here.
        donor_pool: images that a fill chose from; a different number of ranks may change it.
        kernels: kernels of its steps.
        others: further modules that change with the steps (`Job.others`).
    """
    return {
        "model": student.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
        "must_agree": must_agree,
        "donor_pool": donor_pool,
        "kernels": asdict(kernels),
        **{name: module.state_dict() for name, module in others.items()},
    }


@document
class Content:
    """The content of a checkpoint file."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    progress: dict[str, Any]
    must_agree: dict[str, dict[str, Any]]
    donor_pool: Count
    # the default is what all versions before this field computed with
    kernels: dict[str, Any] = field(default_factory=dict)
    # only in runs that have them
    text: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, dict[str, Any]]:
        """State dicts by the name of their module."""
        return {"model": self.model, "text": self.text, "teacher": self.teacher}


@document(name="optimizer")
class OptimizerState:
    """The state dict of torch's optimizers."""

    state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Any]]


@dataclass(frozen=True)
class Own:
    """The resuming run, which a checkpoint must match."""

    student: Classifier
    optimizer: torch.optim.AdamW
    must_agree: dict[str, Any]
    total_steps: int
    most_correct: int
    """The largest count that can select a model."""
    others: Mapping[str, nn.Module] = field(default_factory=dict)
    """Further modules that change with the steps (`Job.others`)."""

    def tensors(self) -> dict[str, Tensor]:
        """List the tensors of this run's checkpoints, each as one of the same shape and type."""
        modules = {"model": self.student, **self.others}
        own = {
            f"{module}.{name}": value
            for module, found in modules.items()
            for name, value in found.state_dict().items()
        }
        groups = self.optimizer.param_groups
        parameters = (parameter for group in groups for parameter in group["params"])
        for number, parameter in enumerate(parameters):
            place = f"optimizer.{number}"
            # fused AdamW counts steps in zero-dimensional fp32 tensors, one per parameter
            own[f"{place}.step"] = torch.zeros(())
            own[f"{place}.exp_avg"] = own[f"{place}.exp_avg_sq"] = parameter
            if isinstance(self.optimizer, Anchored):
                extra = self.optimizer.extra_state(parameter)
                own |= {f"{place}.{name}": like for name, like in extra.items()}
        return own


@dataclass(frozen=True)
class Saved:
    """The verified content of a checkpoint, with tensors on the CPU."""

    model: dict[str, Tensor]
    others: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]
    progress: Progress
    donor_pool: int
    kernels: Choice


def load(store: Store, record: Record, own: Own) -> Saved:
    """Read a checkpoint.

    Raises:
        ValueError: if it cannot be read, was made by a different run, on other data or in a
            different sample order, or holds anything that this run would not have written.
    """
    url = files.join(store.url, record.name)
    with files.local_copy(url) as path:
        if not path.exists():
            raise ValueError(f"no checkpoint at {url}; do all nodes see the same files?")
        try:
            content = _read(path)
            made_by = dict(content.must_agree)
            if "config" in made_by:
                made_by["config"] = completed(made_by["config"])
            if not (changed := files.difference(made_by, own.must_agree)):
                return _fitting(content, path.stat().st_size, record, own)
        except unpickle.DAMAGE as error:
            # `path` may be a temporary copy, and `unpickle.read` begins its messages with it
            lines = str(error).removeprefix(f"{path} is ").splitlines() or [type(error).__name__]
            why = printable(lines[0], unpickle.SHOWN)
            raise ValueError(
                f"{url} is not a checkpoint of this run: {why}. Delete it to resume from the one "
                "before, or use a new run folder (docs/training.md#stop-and-resume)"
            ) from error
    more = f"; and {len(changed) - MOST_CHANGED} more" if len(changed) > MOST_CHANGED else ""
    shown = "; ".join(printable(one, unpickle.SHOWN) for one in changed[:MOST_CHANGED])
    option = repeat_precision(content.must_agree.get("config", {}), own.must_agree["config"])
    raise ValueError(
        f"{url} was made on other data or by a different run and cannot be resumed: {shown}{more}. "
        f"Restore the data, repeat its options{option} or use a new run folder "
        "(docs/training.md#stop-and-resume)"
    )


def _read(path: Path) -> Content:
    content, _ = unpickle.read(path)
    unpickle.require_data(content)
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}")
    return Content(**content)


def _fitting(content: Content, size: int, record: Record, own: Own) -> Saved:
    """Verify that this run could have written the content of a file of `size` bytes."""
    progress = Progress(**content.progress)
    if (progress.step, progress.best_step) != (record.step, record.best_step):
        raise ValueError("its record has a different step or best_step")
    if progress.step > own.total_steps or progress.best_correct > own.most_correct:
        raise ValueError(
            f"progress.step is {progress.step} of {own.total_steps} and progress.best_correct "
            f"{progress.best_correct} of {own.most_correct}"
        )
    optimizer = OptimizerState(**content.optimizer)
    # everything else in the groups follows from schedule and options
    groups = own.optimizer.state_dict()["param_groups"]
    if [group.get("params") for group in optimizer.param_groups] != [g["params"] for g in groups]:
        raise ValueError("optimizer.param_groups are of other parameters")
    tensors = _tensors(content.weights, optimizer.state, size, own, progress.step)
    weights = {
        module: {name: tensors[f"{module}.{name}"] for name in found}
        for module, found in content.weights.items()
    }
    return Saved(
        model=weights["model"],
        others={module: weights[module] for module in own.others},
        optimizer={
            "state": {
                number: {name: tensors[f"optimizer.{number}.{name}"] for name in entry}
                for number, entry in optimizer.state.items()
            },
            "param_groups": groups,
        },
        progress=progress,
        donor_pool=content.donor_pool,
        kernels=Choice(**content.kernels),
    )


def _tensors(
    weights: dict[str, dict[str, Any]],
    state: dict[int, dict[str, Any]],
    size: int,
    own: Own,
    step: int,
) -> dict[str, Tensor]:
    """Read the tensors of models and optimizer, checked against `Own.tensors`."""
    found = {
        f"{module}.{name}": value
        for module, values in weights.items()
        for name, value in values.items()
    }
    for number, entry in state.items():
        found |= {f"optimizer.{number}.{name}": value for name, value in entry.items()}
    wanted = own.tensors()
    for name in sorted(found.keys() | wanted.keys()):
        stored = found.get(name)
        if name not in wanted or not isinstance(stored, unpickle.StoredTensor):
            raise ValueError(f"{name} is {'no tensor' if name in wanted else 'not of this model'}")
        # before any tensor is read, so that a wrong size costs no memory
        if stored.size != tuple(wanted[name].shape):
            raise ValueError(f"{name} is {stored.size}, not {tuple(wanted[name].shape)}")
    tensors = unpickle.load_tensors(found, size)
    for name, tensor in tensors.items():
        if tensor.dtype != wanted[name].dtype:
            raise ValueError(f"{name} is {tensor.dtype}, not {wanted[name].dtype}")
        if not _in_range(name, tensor, step):
            raise ValueError(f"{name} holds NaN, infinities or numbers out of range")
    return tensors


def _in_range(name: str, tensor: Tensor, step: int) -> bool:
    if name.endswith(f".{anchored.RADIUS}"):
        return bool(tensor.isfinite()) and float(tensor) > 0
    signed = (".exp_avg", f".{anchored.STEP}", f".{anchored.RADIUS_AVG}")
    if not name.startswith("optimizer.") or name.endswith(signed):
        return bool(tensor.isfinite().all())
    if name.endswith(".step"):
        # never 0, because AdamW creates its state in its first step
        return 1 <= float(tensor) <= step
    return bool((tensor >= 0).all())  # squares may overflow to infinity


def resume(store: Store, world: World, own: Own, donor_pool: int) -> tuple[Progress, Choice | None]:
    """Load the newest intact checkpoint into student and optimizer; without one, start at step 0.

    Returns the progress, and the kernels used so far; None at the start.

    Args:
        store: the checkpoints.
        world: the ranks.
        own: the resuming run.
        donor_pool: images that a fill chooses from now.

    Raises:
        ValueError: if it was made by a different run, on other data or in a different sample order,
            or is not a valid checkpoint; student and optimizer are then unchanged.
    """
    # only one rank searches, because that hashes each file and renames damaged ones
    record = dist.from_main(world, dist.on_main(world, store.newest_whole))
    if record is None:
        return Progress(), None
    saved = load(store, record, own)
    own.student.load_state_dict(saved.model)
    for name, module in own.others.items():
        module.load_state_dict(saved.others[name])
    own.optimizer.load_state_dict(saved.optimizer)
    if world.is_main:
        log.info(f"resuming after step {record.step}")
        if saved.donor_pool != donor_pool:
            log.info(
                f"fills now choose from {donor_pool} images, before from {saved.donor_pool}: the "
                "batches stay the same, the counterfactuals do not (with --method.donors global "
                "from the start they would)"
            )
    return saved.progress, saved.kernels
