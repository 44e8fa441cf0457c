"""Cost of a checkpoint during training: `python -m benchmarks.checkpoint [--save]`.

The training loop's own step runs repeatedly, with one checkpoint per minute written in three ways:
not at all, as the loop does it (copied, then written by a background thread), and before the next
step. Two numbers for each: how long the training thread is held up, which is the complete cost on a
GPU, and how much longer the steps take. On a CPU the second includes the work of the thread.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, step
from rft import cli, dist
from rft.storage import files
from rft.train.checkpoint import Progress, Store, Writer, content
from rft.train.kernels import Choice
from rft.train.optim import build_optimizer

RESULTS = Path(__file__).parent / "results"
MINUTE = 60.0


@dataclass(frozen=True)
class Arguments:
    """Time training steps of the main recipe with checkpoints."""

    model: str = "ViT-B-32"
    """open_clip model name; its weights are random."""
    batch_size: int = 16
    """Images per step."""
    rounds: int = 3
    """Minutes of each variant, in turn."""
    seconds: float = MINUTE
    """Length of one such minute, with one checkpoint."""
    folder: Path | None = None
    """Folder for checkpoints; a temporary folder by default."""
    save: bool = False
    """Also write the result to benchmarks/results/."""


def a_minute(
    train: Callable[[], None], steps: int, write: Callable[[], None]
) -> tuple[float, float]:
    """Time so many steps; return their seconds, and those for which a checkpoint held them up."""
    started = time.perf_counter()
    train()
    before = time.perf_counter()
    write()
    held = time.perf_counter() - before
    for _ in range(steps - 1):
        train()
    return time.perf_counter() - started, held


def measure(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """Collect the document to save."""
    options = step.Arguments(model=arguments.model, batch_size=arguments.batch_size)
    device = dist.pick_device("auto", step.WORLD)
    student = step.build_classifier(options.model, options.classes)
    precision = "bf16" if device.type == "cuda" else "fp32"
    job = step.build_job(options, device, precision, student)
    train = step.build_steps(options, device, precision, student)["step"]
    optimizer = build_optimizer(job.objective, job.config.optim)
    for parameter in student.parameters():  # a state as large as during training
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    store, number = Store(str(folder), keep=2), 0

    def what() -> dict[str, Any]:
        nonlocal number
        number += 1
        return content(student, optimizer, Progress(step=number), {}, 1, Choice())

    train()
    before = time.perf_counter()
    train()
    steps = max(1, round(arguments.seconds / (time.perf_counter() - before)))
    seconds: dict[str, list[float]] = {"none": [], "background": [], "waiting": []}
    held: dict[str, list[float]] = {name: [] for name in seconds}
    with Writer(store) as writer:
        ways: dict[str, Callable[[], Any]] = {
            "none": lambda: None,
            "background": lambda: writer.write(what(), lambda *_: None),
            "waiting": lambda: store.write(what()),
        }
        for _ in range(arguments.rounds):
            for name, write in ways.items():
                took, waited = a_minute(train, steps, write)
                seconds[name].append(took)
                held[name].append(waited)
                writer.wait()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "benchmark": "checkpoint",
        **machine.describe(machine.STEP),
        "device": device.type,
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        **{name: value for name, value in asdict(arguments).items() if name in SETTINGS},
        "steps": steps,
        "checkpoint_bytes": max(path.stat().st_size for path in folder.glob("*.pt")),
        "seconds": {
            name: [round(value, 2) for value in values] for name, values in seconds.items()
        },
        "held_seconds": {name: [round(v, 3) for v in values] for name, values in held.items()},
        "held_share": {
            name: round(statistics.median(held[name]) / medians[name], 4) for name in held
        },
        "longer": {name: round(value / medians["none"] - 1, 4) for name, value in medians.items()},
    }


SETTINGS = ("model", "batch_size", "rounds")
NAMES = {"background": "in the background (rft)", "waiting": "before the next step"}


def table(result: dict[str, Any]) -> str:
    """Format the result as Markdown."""
    lines = [
        "| one checkpoint a minute, written | training held up | of its time | steps take longer |",
        "| --- | --: | --: | --: |",
    ]
    for way, name in NAMES.items():
        held = statistics.median(result["held_seconds"][way])
        lines.append(
            f"| {name} | {held:.2f} s | {result['held_share'][way]:.1%} | "
            f"{result['longer'][way]:.1%} |"
        )
    return "\n".join(lines)


def note(result: dict[str, Any]) -> str:
    """Describe what the numbers were measured on."""
    return (
        f"{result['model']}, {result['batch_size']} images a step, a checkpoint of "
        f"{result['checkpoint_bytes'] / 1e9:.2f} GB on a local disk; medians of {result['rounds']} "
        f"minutes each, in turn, on {result['accelerator'] or 'the CPU'}, {result['cores']} cores; "
        f"{machine.made(result)}. On a CPU the thread that writes takes its time from the steps; "
        "GPU: not measured."
    )


def main() -> None:
    """Measure and print."""
    arguments = cli.parse(Arguments, prog="benchmarks.checkpoint")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = measure(arguments, Path(folder))
    print(table(result))
    if arguments.save:
        files.write_json(str(RESULTS / f"checkpoint_{result['device']}.json"), result)
        if result["device"] == "cpu":
            text = f"{table(result)}\n\n{note(result)}\n"
            files.write_bytes(str(RESULTS / "checkpoint.md"), text.encode())
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
