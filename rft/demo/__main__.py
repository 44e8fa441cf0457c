"""The paper's experiment in miniature: `python -m rft.demo`.

Runs the commands that a cluster would run (pack, torchrun train, merge, torchrun evaluate, report)
on a small procedural world, and prints each. Whatever is already done is skipped.
"""

import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rft import cli
from rft.clip.classifier import SELECTED
from rft.data.loader import PackedDataset
from rft.demo.miniature import FOLDER, prepare_data, shards
from rft.evaluate.__main__ import SETS, is_current
from rft.report.page import write_report
from rft.train.__main__ import parse
from rft.train.run import is_finished

FINE_TUNED = ("vanilla", "no-mask", "object-mask-single-fill")


@dataclass(frozen=True)
class Demo:
    """Run the paper's experiment on the miniature world, from images on disk to a report.

    Zero-shot, vanilla fine-tuning, distillation without masks, WiSE-FT and object-mask single-fill,
    each on ImageNet's place-holder and the five OOD benchmarks'.
    """

    out: Path = FOLDER
    """Folder for the world, the shards, the runs and the report."""
    seeds: int = 1
    """Fine-tuning seeds; with several the table shows mean and spread."""
    processes: int = 2
    """Ranks that torchrun starts."""
    epochs: int | None = None
    """Fine-tune for fewer epochs than the recipes do, to try the path."""


@dataclass(frozen=True)
class Pretrain:
    """Train the tiny CLIP that plays the pre-trained model, as it was for the one shipped."""

    out: Path
    """Folder for the weights, their configuration and vocabulary."""
    seed: int = 0


def demo(arguments: Demo) -> None:
    """Run every stage that is not done yet; print the table and the report's path last."""
    started = time.perf_counter()
    prepare_data(arguments.out)
    data = shards(arguments.out)
    runs = [fine_tune(arguments, data, "zero-shot", 0)]
    for seed in range(arguments.seeds):
        tuned = {name: fine_tune(arguments, data, name, seed) for name in FINE_TUNED}
        merged = arguments.out / "runs" / f"wise-ft-0.5-seed{seed}"
        if not (merged / "provenance.json").exists():
            merge = ("-m", "rft.merge", "wise", str(runs[0]), str(tuned["vanilla"]))
            run(sys.executable, *merge, "--alpha", "0.5", "--out", str(merged))
        runs += [*tuned.values(), merged]
    sets = {name: PackedDataset(str(data / name)) for name in SETS}
    manifests = {name: packed.manifest.sha256 for name, packed in sets.items()}
    if waiting := [str(path) for path in runs if not is_current(path, manifests)]:
        torchrun(arguments, "rft.evaluate", *waiting, "--data", str(data), "--workers", "0")
    table = write_report(runs, arguments.out / "report")
    print(f"\n{table}\ndone in {time.perf_counter() - started:.0f} s")
    print(f"report: {arguments.out / 'report' / 'index.html'}")


def fine_tune(arguments: Demo, data: Path, recipe: str, seed: int) -> Path:
    """Train one recipe unless its run is finished; return the run folder."""
    folder = arguments.out / "runs" / f"{recipe}-seed{seed}"
    options = [recipe, "--scale", "miniature", "--data", str(data), "--run-dir", str(folder)]
    options += ["--seed", str(seed)]
    if arguments.epochs is not None and recipe != "zero-shot":
        options += ["--optim.epochs", str(arguments.epochs)]
    if not is_finished(parse(options)):
        torchrun(arguments, "rft.train", *options)
    assert (folder / SELECTED).exists()
    return folder


def torchrun(arguments: Demo, module: str, *options: str) -> None:
    """Start a module of rft on the configured number of ranks."""
    launcher = ("-m", "torch.distributed.run", "--standalone")
    processes = ("--nproc_per_node", str(arguments.processes))
    run(sys.executable, *launcher, *processes, "-m", module, *options)


def run(*command: str) -> None:
    """Print a command and run it.

    Raises:
        ValueError: if it fails.
    """
    shown = shlex.join(("python", *command[1:]))
    print(f"\n$ {shown}", flush=True)
    # one thread for each rank, which is what torchrun would choose after saying so at length
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    if code := subprocess.run(command, env=environment).returncode:
        raise ValueError(f"exit code {code} from: {shown}")


def main() -> None:
    """Parse and run."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["pretrain"]:
        from rft.demo.pretrain import pretrain

        chosen = cli.parse(Pretrain, args=arguments[1:], prog="rft.demo pretrain")
        pretrain(chosen.out, chosen.seed)
        return
    demo(cli.parse(Demo, args=arguments, prog="rft.demo"))


if __name__ == "__main__":
    cli.run(main)
