"""What a run records while it trains: metrics.jsonl, TensorBoard, wandb, log lines or a bar."""

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

SECONDS_PER_LINE = 60.0  # without a terminal; each held-out result is a line too
SECONDS_TO_UPLOAD = 30.0  # at the end; a job that is asked to stop has little time
PICTURES = "counterfactuals"

log = logging.getLogger(__name__)


def require_packages(config: Config) -> None:
    """Check that what the run is to log to is installed.

    Raises:
        ValueError: with the command that installs it.
    """
    if not config.log.wandb:
        return
    try:
        # not find_spec: the folder ./wandb that wandb itself leaves behind looks like a module
        importlib.metadata.version("wandb")
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            "--log.wandb needs a package that is not installed: pip install -e '.[wandb]'"
        ) from error


class Journal:
    """All of it on the main rank; on the others nothing is written or shown."""

    def __init__(self, config: Config, done: int, total: int, *, writes: bool) -> None:
        self._writes, self._image_steps = writes, config.log.image_steps
        if not writes:
            return
        self._folder = Path(config.run)
        path, last = self._folder / filenames.METRICS, None
        self._time = 0.0
        # a killed run may have logged beyond its last checkpoint, and half a line at the end
        with files.publish(str(path)) as kept, local.writer(kept) as stream:
            for text, line in records.read_metrics(path):
                # the text as it stands: fields of a different version of rft stay
                if line.step <= done:
                    stream.write(text)
                    self._time = line.time or 0.0
                    if line.held_out_correct is not None and line.held_out_total is not None:
                        last = Count(line.held_out_correct, line.held_out_total)
        if done == 0:
            # curves of a run that never reached a checkpoint
            shutil.rmtree(self._folder / filenames.TENSORBOARD, ignore_errors=True)
        self._wandb = Wandb(config, done) if config.log.wandb else None
        # appended to in place, so a link that took its place since would be written through
        descriptor = local.open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        self._stream = os.fdopen(descriptor, "a")
        # hides what a killed run wrote there beyond its last checkpoint: those steps are repeated
        self._writer = SummaryWriter(str(self._folder / filenames.TENSORBOARD), purge_step=done + 1)
        # held open, so that a folder that takes its place cannot get its number
        self._held = os.open(self._folder, os.O_RDONLY)
        # a benchmark trains without one
        sign = self._folder / filenames.CONFIG
        self._sign = sign if sign.exists() else self._folder
        self._display = Display(config, done, total, last)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record the means of the steps since the last call."""
        if self._writes:
            self._write(step, values)
            self._display.update(step, values)

    def held_out(self, step: int, count: Count) -> None:
        """Record a held-out result."""
        if self._writes:
            self._write(step, {"held_out_correct": count.correct, "held_out_total": count.total})
            self._display.held_out(step, count)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line, with its time, and its scalars."""
        # the clock of a machine may be set back, and the lines are read as a sequence
        self._time = max(self._time, round(time.time(), 3))
        with self._writing():
            self._stream.write(json.dumps({"step": step, "time": self._time, **values}) + "\n")
            self._stream.flush()
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            if self._wandb:
                self._wandb.write(step, values)

    def collects(self, step: int) -> list[Counterfactuals] | None:
        """Give the step a list to leave its counterfactuals in, None if they will not be shown."""
        wanted = self._writes and self._image_steps and step % self._image_steps == 0
        return [] if wanted else None

    def pictures(self, step: int, shown: list[Counterfactuals] | None, side: int) -> None:
        """Record what `collects` got of a step, if anything, as a picture; `side` is a patch's."""
        if not shown:
            return
        with self._writing():
            grid_CHW = grid(shown[0], side)
            self._writer.add_image(PICTURES, grid_CHW, step)
            if self._wandb:
                self._wandb.pictures(step, grid_CHW)

    def require_folder(self) -> None:
        """Check that the run folder is the one that it was, before anything is written into it.

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
                f"cannot write the logs in {self._folder}: {files.reason(error)}. Make room, then "
                "run the same command again"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._writes:
            return
        self._display.close()
        # the error that ended the run is raised, not that its logs could not be closed then
        with contextlib.suppress(OSError) if kind else self._writing():
            self._stream.close()
            self._writer.close()
            os.close(self._held)
            if self._wandb:
                # wandb shows a run that failed as such
                self._wandb.close(failed=kind is not None)


class Wandb:
    """One Weights & Biases run for one run folder, however often it is resumed.

    Of this machine it gets nothing but what wandb cannot do without: no source, no console, no
    git remote, host, user, package list or hardware, and URLs without their credentials. Without a
    network, WANDB_MODE=offline keeps everything in the run folder for `wandb sync`. A run outlives
    wandb's process, which takes a scheduler's signal, meant for every process, for its own end.
    """

    def __init__(self, config: Config, done: int) -> None:
        # an extra, and slow to import
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
            # wandb keeps what a killed run logged beyond its last checkpoint, takes nothing twice
            if step >= self._run.step:
                self._run.log(dict(values), step=step)

        self._ask(send)

    def pictures(self, step: int, grid_CHW: Tensor) -> None:
        """Add a picture, uint8."""
        self.write(step, {PICTURES: self._image(grid_CHW.permute(1, 2, 0).numpy())})

    def close(self, *, failed: bool) -> None:
        """Send what is left, for as long as a job that is asked to stop can wait."""
        self._ask(lambda: self._run.finish(exit_code=int(failed)))

    def _ask(self, work: Callable[[], None]) -> None:
        if not self._answers:
            return
        try:
            work()
        except Exception as error:  # its process, its service and the network have their own errors
            self._answers = False
            log.warning(f"nothing more goes to wandb: {files.reason(error)}")


def wandb_id(folder: Path, done: int) -> str:
    """Identify the wandb run of a run folder: a new one if nothing of it is done yet.

    It lies in the folder: made of the configuration and the path alone it would be the same after
    the folder was deleted, and wandb would take nothing of the new run for its first steps.
    """
    path = folder / filenames.WANDB_ID
    if done == 0 or not path.exists():
        files.write_bytes(str(path), uuid.uuid4().hex.encode())
    return path.read_text()


class Display:
    """Shows a user how far the run is: a bar and a line on a terminal, log lines elsewhere."""

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
        # the first means at once: they show that the run works; the last, where no held-out count
        # follows with a line of its own
        is_last = step == self._total and self._held_out is None
        due = self._spoke is None or time.monotonic() - self._spoke > SECONDS_PER_LINE
        if due or is_last:
            self._log(self._shown([f"step {step}/{self._total}", self._status]))

    def held_out(self, step: int, count: Count) -> None:
        """Show a held-out result, which stays on the line until the next one."""
        self._held_out = count
        result = f"held-out {100 * count.share:.2f}% ({count.correct}/{count.total})"
        line = f"step {step}/{self._total}  {result}"
        self._log(line if self._bar.is_drawn else f"{line}  {self._status}".rstrip())
        self._bar.show(step, self._shown(self._parts))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.close()

    def _shown(self, parts: list[str]) -> str:
        """Make one line, with the last held-out share at its end."""
        last = [] if self._held_out is None else [f"held-out {100 * self._held_out.share:.2f}%"]
        return "  ".join([*parts, *last])

    def _log(self, line: str) -> None:
        log.info(line)
        self._spoke = time.monotonic()


def status(config: Config, values: Mapping[str, float]) -> list[str]:
    """Format the means of some steps: epoch, loss and its parts, speed, wait for data."""
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
