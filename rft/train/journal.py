"""Records of a training run: metrics.jsonl, TensorBoard, wandb, log lines or a bar."""

import contextlib
import importlib.metadata
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from rft.config import Config
from rft.evaluate.count import Count
from rft.progress import Bar
from rft.runs import filenames, records
from rft.storage import files, local
from rft.train.pictures import Counterfactuals, grid
from rft.train.run import vanished

SECONDS_PER_LINE = 60.0  # without a terminal; held-out results get lines of their own
SECONDS_TO_UPLOAD = 30.0  # at the end; a job that must stop has little time
PICTURES = "counterfactuals"

log = logging.getLogger(__name__)


def require_packages(config: Config) -> None:
    """Check that the packages for the requested logs are installed.

    Raises:
        ValueError: with the command that installs it.
    """
    if not config.log.wandb:
        return
    try:
        # not find_spec: the folder ./wandb that wandb leaves behind looks like a module
        importlib.metadata.version("wandb")
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            "--log.wandb needs the package wandb; in rft's clone: pip install '.[wandb]'"
        ) from error


class Journal:
    """All records of a run, on the main rank only; other ranks write and show nothing."""

    def __init__(self, config: Config, done: int, total: int, *, writes: bool) -> None:
        self._writes, self._image_steps = writes, config.log.image_steps
        if not writes:
            return
        self._folder = Path(config.run)
        # before any file changes, because it may refuse
        self._wandb = Wandb(config, done) if config.log.wandb else None
        path, last = self._folder / filenames.METRICS, None
        self._time = 0.0
        # a killed run may have logged beyond its last checkpoint, and left half a line
        with files.publish(str(path)) as kept, local.writer(kept) as stream:
            for text, line in records.read_metrics(path):
                # the original text, so that fields of other versions of rft are kept
                if line.step <= done:
                    stream.write(text)
                    self._time = line.time or 0.0
                    if line.held_out_correct is not None and line.held_out_total is not None:
                        last = Count(line.held_out_correct, line.held_out_total)
        if done == 0:
            # remove the curves of a run that never reached a checkpoint
            shutil.rmtree(self._folder / filenames.TENSORBOARD, ignore_errors=True)
        # O_NOFOLLOW: appending would write through a link that replaced the file meanwhile
        descriptor = local.open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        self._stream = os.fdopen(descriptor, "a")
        # purge_step hides records of a killed run after its last checkpoint: those steps are
        # repeated
        self._writer = SummaryWriter(str(self._folder / filenames.TENSORBOARD), purge_step=done + 1)
        # held open, so that a replacing folder cannot get the same inode number
        self._held = os.open(self._folder, os.O_RDONLY)
        # training writes it before the first step
        self._sign = self._folder / filenames.CONFIG
        self._display = Display(config, done, total, last)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record the means over the steps since the last call."""
        if self._writes:
            self._write(step, values)
            self._display.update(step, values)

    def held_out(self, step: int, count: Count) -> None:
        """Record a held-out result."""
        if self._writes:
            self._write(step, {"held_out_correct": count.correct, "held_out_total": count.total})
            self._display.held_out(step, count)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line with its time to metrics.jsonl, and the scalars to the other logs."""
        # never decreasing, even if the machine's clock is set back: readers expect a sequence
        self._time = max(self._time, round(time.time(), 3))
        with self._writing():
            self._stream.write(json.dumps({"step": step, "time": self._time, **values}) + "\n")
            self._stream.flush()
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            if self._wandb:
                self._wandb.write(step, values)

    def collects(self, step: int) -> list[Counterfactuals] | None:
        """Return a list for the step's counterfactuals; None if they will not be shown."""
        wanted = self._writes and self._image_steps and step % self._image_steps == 0
        return [] if wanted else None

    def pictures(self, step: int, shown: list[Counterfactuals] | None, side: int) -> None:
        """Record a step's collected counterfactuals as a picture; a patch has `side` pixels."""
        if not shown:
            return
        with self._writing():
            grid_CHW = grid(shown[0], side)
            self._writer.add_image(PICTURES, grid_CHW, step)
            if self._wandb:
                self._wandb.pictures(step, grid_CHW)

    def require_folder(self) -> None:
        """Check that the run folder is still the same folder, before writing into it.

        Raises:
            ValueError: if it was deleted, emptied or replaced.
        """
        if not self._writes:
            return
        try:
            same = os.path.samestat(self._folder.stat(), os.fstat(self._held))
            self._sign.stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(vanished(self._folder)) from error
        if not same:
            raise ValueError(vanished(self._folder, "was replaced by a different folder"))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        self.require_folder()
        try:
            yield
        except OSError as error:
            raise OSError(
                f"cannot write the logs in {self._folder}: {files.reason(error)}. Free space, then "
                "run the same command to resume"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._writes:
            return
        self._display.close()
        # if an error ended the run, that error is raised, not one of closing the logs
        with contextlib.suppress(OSError) if kind else self._writing():
            self._stream.close()
            self._writer.close()
            os.close(self._held)
            if self._wandb:
                # wandb marks failed runs
                self._wandb.close(failed=kind is not None)


class Wandb:
    """One Weights & Biases run per run folder, however often it is resumed.

    wandb receives only the data about this machine that it requires: no source, console, git
    remote, host, user, package list or hardware, and URLs without credentials. Without a network,
    WANDB_MODE=offline keeps everything in the run folder for `wandb sync`. The run continues if
    wandb's process ends: a scheduler signals every process, and wandb's process exits on it.
    """

    def __init__(self, config: Config, done: int) -> None:
        # an optional dependency, and slow to import
        import wandb  # pyrefly: ignore[missing-import]

        self._image, self._answers = wandb.Image, True
        folder = Path(config.run)
        try:
            self._run = wandb.init(
                project=config.log.wandb,
                name=folder.resolve().name,
                id=wandb_id(folder, done),
                resume="allow",
                dir=str(folder),
                config=config.to_dict(),
                settings=wandb.Settings(
                    console="off",
                    disable_code=True,
                    disable_git=True,
                    disable_job_creation=True,
                    save_code=False,
                    x_disable_machine_info=True,
                    x_disable_meta=True,
                    x_disable_stats=True,
                    x_save_requirements=False,
                    host="",
                    username="",
                    email="",
                    program="rft.train",
                    finish_timeout=SECONDS_TO_UPLOAD,
                ),
            )
        except wandb.Error as error:
            raise ValueError(
                f"--log.wandb {config.log.wandb}: {files.reason(error)} (WANDB_MODE=offline needs "
                "neither login nor network)"
            ) from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the values of a step."""

        def send() -> None:
            # wandb refuses a step twice, and already has those after a killed run's last checkpoint
            if step >= self._run.step:
                self._run.log(dict(values), step=step)

        self._ask(send)

    def pictures(self, step: int, grid_CHW: Tensor) -> None:
        """Add a uint8 picture."""
        self.write(step, {PICTURES: self._image(grid_CHW.permute(1, 2, 0).numpy())})

    def close(self, *, failed: bool) -> None:
        """Send the remaining data, within the time that a stopping job can wait."""
        self._ask(lambda: self._run.finish(exit_code=int(failed)))

    def _ask(self, work: Callable[[], None]) -> None:
        if not self._answers:
            return
        try:
            work()
        except Exception as error:  # its process, its service and the network raise various errors
            self._answers = False
            log.warning(f"logging to wandb stopped: {files.reason(error)}")


def wandb_id(folder: Path, done: int) -> str:
    """Read the id of a run folder's wandb run; a new id if no step is done yet.

    The id is stored in the folder. If it were derived from configuration and path, it would be the
    same after the folder was deleted, and wandb would refuse the first steps of the new run.
    """
    path = folder / filenames.WANDB_ID
    if done == 0 or not path.exists():
        files.write_bytes(str(path), uuid.uuid4().hex.encode())
    return path.read_text()


class Display:
    """Progress for the user: a bar and a status line on a terminal, otherwise log lines."""

    def __init__(self, config: Config, done: int, total: int, held_out: Count | None) -> None:
        self._config, self._total, self._held_out = config, total, held_out
        self._spoke: float | None = None
        self._parts: list[str] = []
        self._status = ""
        self._bar = Bar(config.recipe, total, done)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show the newest means."""
        self._parts = status(self._config, values)
        self._bar.show(step, self._shown(self._parts))
        self._status = "  ".join([*self._parts, f"ETA {self._bar.left}"])
        if self._bar.is_drawn:
            return
        # log the first means at once, to show that the run works, and the last if no held-out
        # result follows with a line of its own
        is_last = step == self._total and self._held_out is None
        due = self._spoke is None or time.monotonic() - self._spoke > SECONDS_PER_LINE
        if due or is_last:
            self._log(self._shown([f"step {step}/{self._total}", self._status]))

    def held_out(self, step: int, count: Count) -> None:
        """Show a held-out result, and keep it in the status line until the next one."""
        self._held_out = count
        result = f"held-out {100 * count.share:.2f}% ({count.correct}/{count.total})"
        line = f"step {step}/{self._total}  {result}"
        self._log(line if self._bar.is_drawn else f"{line}  {self._status}".rstrip())
        self._bar.show(step, self._shown(self._parts))

    def close(self) -> None:
        """Restore the terminal."""
        self._bar.close()

    def _shown(self, parts: list[str]) -> str:
        """Format one line that ends with the last held-out accuracy."""
        last = [] if self._held_out is None else [f"held-out {100 * self._held_out.share:.2f}%"]
        return "  ".join([*parts, *last])

    def _log(self, line: str) -> None:
        log.info(line)
        self._spoke = time.monotonic()


def status(config: Config, values: Mapping[str, float]) -> list[str]:
    """Format the means over some steps: epoch, loss and its parts, speed, wait for data."""
    method = config.method
    fits = "contrastive" if method.loss == "contrastive" else "ce"
    parts = [f"{fits} {values[fits]:.3f}"]
    if method.distill_weight:
        parts.append(f"{method.distill_weight:g} x mse {values['mse']:.4f}")
    if method.kd_weight:
        parts.append(f"{method.kd_weight:g} x kd {values['kd']:.4f}")
    if method.context_weight:
        parts.append(f"{method.context_weight:g} x context {values['context']:.4f}")
    if method.lipsum_weight:
        parts.append(f"{method.lipsum_weight:g} x lipsum {values['lipsum']:.4f}")
    if method.head_weight:
        parts.append(f"{method.head_weight:g} x head {values['head']:.4f}")
    images_per_s = values["images_per_s"]
    seconds_per_step = config.loader.batch_size / images_per_s
    waiting = values["data_wait_ms"] / 1000 / seconds_per_step
    return [
        f"epoch {values['epoch']:.2f}/{config.optim.epochs}",
        f"loss {values['loss']:.3f} = {' + '.join(parts)}",
        f"{images_per_s:.{0 if images_per_s >= 10 else 1}f} img/s",
        f"data wait {100 * waiting:.0f}%",
    ]
