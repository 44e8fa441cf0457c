"""What a run tells while it trains: metrics.jsonl, TensorBoard scalars, a line for a person."""

import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from rft import files
from rft.config import Config
from rft.evaluate.accuracy import Count

SECONDS_PER_LINE = 60.0  # where there is no terminal; each held-out result is a line too


class Journal:
    """All of it on the main rank; on the others nothing is written or shown."""

    def __init__(self, config: Config, done: int, total: int, *, writes: bool) -> None:
        self._logs = Logs(Path(config.run), done) if writes else None
        self._display = Display(config.recipe, done, total) if writes else None

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record the means of the steps since the last call."""
        if self._logs and self._display:
            self._logs.write(step, values)
            self._display.update(step, values)

    def held_out(self, step: int, count: Count) -> None:
        """Record a held-out result."""
        if self._logs and self._display:
            values = {"held_out_correct": count.correct, "held_out_total": count.total}
            self._logs.write(step, values)
            self._display.held_out(step, count)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._logs and self._display:
            self._display.close()
            self._logs.close()


class Logs:
    """metrics.jsonl and TensorBoard scalars."""

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / "metrics.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        # a killed run may have logged beyond its last checkpoint, and half a line at the end
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        files.write_bytes(str(self._path), "".join(f"{line}\n" for line in kept).encode())
        if step == 0:
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self._stream = self._path.open("a")
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line and its scalars."""
        self._stream.write(json.dumps({"step": step, **values}) + "\n")
        self._stream.flush()
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both logs."""
        self._stream.close()
        self._writer.close()


class Display:
    """What a person sees: a bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, name: str, done: int, total: int) -> None:
        self._total = total
        columns = (
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
        )
        console = Console(file=sys.stderr)
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("train", total=self._total, completed=done, status="")
        self._status = ""
        self._spoke = time.monotonic()
        self._bar.start()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show the newest means."""
        distilled = values["loss"] - values["ce"]
        self._status = (
            f"loss {values['loss']:.3f} = ce {values['ce']:.3f} + distillation {distilled:.3f}  "
            f"{values['images_per_s']:.0f} img/s, {values['data_wait_ms']:.0f} ms wait for data"
        )
        self._bar.update(self._task, completed=step, status=self._status)
        if self._bar.disable and time.monotonic() - self._spoke > SECONDS_PER_LINE:
            self._say(f"step {step}/{self._total}  {self._status}")

    def held_out(self, step: int, count: Count) -> None:
        """Show a held-out result."""
        share = f"held-out {100 * count.share:.2f}% ({count.correct}/{count.total})"
        if self._bar.disable:
            self._say(f"step {step}/{self._total}  {share}  {self._status}")
        else:
            self._bar.console.print(f"step {step}/{self._total}  {share}")

    def _say(self, line: str) -> None:
        print(line, flush=True)
        self._spoke = time.monotonic()

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()
