"""The paper's experiments in miniature: `python -m rft.demo` some of them, `... paper` all.

Runs the commands that a cluster would run (pack, torchrun train, merge, torchrun evaluate, report)
on a small procedural world, and prints each. Whatever is already done is skipped.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

from pydantic import Field

from rft import cli, recipes
from rft.demo.miniature import FOLDER, prepare_data, shards
from rft.evaluate.results import is_current
from rft.experiments import Experiment, Study, experiments
from rft.loading.dataset import PackedDataset
from rft.report.page import write_report
from rft.runs import filenames
from rft.sets import TEST_SETS
from rft.storage.documents import Epochs, Positive, Seed, document
from rft.train.command import parse
from rft.train.run import finished

SHOWN = ("zero-shot", "vanilla", "wise-ft", "no-mask", "object-mask-single-fill")
PAPER = """Run every experiment of the paper on the miniature world.

All rows of Tables 1 and 3 and all models of Fig. 7; the table beside the paper's comes last. Data
and runs are shared with the demo in the same folder."""


@document(name="--")
class Demo:
    """Run the paper's experiment on the miniature world, from images on disk to a report.

    Zero-shot, vanilla fine-tuning, distillation without masks, WiSE-FT and object-mask single-fill,
    each on ImageNet's place-holder and the five OOD benchmarks'.
    """

    out: Path = FOLDER
    """Folder for the world, the shards, the runs and the report."""
    seeds: Annotated[Positive, Field(le=1000)] = 1
    """Fine-tuning seeds; with several the table shows mean and spread."""
    processes: Annotated[Positive, Field(le=1000)] = 2
    """Ranks that torchrun starts."""
    epochs: Epochs | None = None
    """Fine-tune for fewer epochs than the recipes do, to try the path."""


@document(name="--")
class Pretrain:
    """Train the tiny CLIP that plays the pre-trained model, as it was for the one shipped."""

    out: Path
    """Folder for the weights, their configuration and vocabulary."""
    seed: Seed = 0


def make(
    arguments: Demo,
    report: str,
    only: tuple[str, ...] = (),
    alphas: tuple[float, ...] = recipes.ALPHAS,
) -> None:
    """Run every stage of a study that is not done yet; print the table and the report's path."""
    started = time.perf_counter()
    out = arguments.out
    study = Study(
        runs=str(out / "runs"),
        data=str(shards(out)),
        report=str(out / report),
        scale="miniature",
        seeds=arguments.seeds,
        epochs=arguments.epochs,
        only=only,
        alphas=alphas,
    )
    # without the last, the report, which this process makes itself
    *stages, _ = experiments(study)
    prepare_data(out)
    for stage in stages:
        if not is_done(stage, study.data):
            run(stage.name, local(stage.command, arguments.processes))
    runs = [Path(path) for one in stages for path in one.makes]
    made = write_report(runs, out / report, data=study.data)
    print(f"\n{made.text()}\ndone in {time.perf_counter() - started:.0f} s")
    print(f"report: {out / report / 'index.html'}")


def is_done(stage: Experiment, data: str) -> bool:
    """Whether a stage's results exist: its command would notice, but takes seconds to start."""
    # after python or torchrun, and -m
    module, *options = stage.command[2:]
    if module == "rft.train":
        return finished(parse(options)) is not None
    if module == "rft.merge":
        # a merge writes it last
        return all((Path(path) / filenames.PROVENANCE).exists() for path in stage.makes)
    assert module == "rft.evaluate"
    # the models stand first (rft.experiments.evaluate)
    models = [Path(path) for path in options[: options.index("--data")]]
    manifests = {name: PackedDataset(f"{data}/{name}").manifest for name in TEST_SETS}
    return all(is_current(path, manifests) for path in models)


# ranks that meet in torchrun's usual store make it listen on every address of the machine
MEET_IN_FILES = {
    "PET_RDZV_BACKEND": "c10d",
    "PET_RDZV_CONF": "store_type=file",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def local(command: tuple[str, ...], processes: int) -> tuple[str, ...]:
    """Return a command of the plan for this interpreter and so many ranks on this machine."""
    launcher, *rest = command
    # what `torchrun` starts, which need not be on the path
    ranks = ("-m", "torch.distributed.run", "--nproc_per_node", str(processes))
    return sys.executable, *{"python": (), "torchrun": ranks}[launcher], *rest


def run(name: str, command: tuple[str, ...]) -> None:
    """Print a command and run it.

    Raises:
        ValueError: if it fails.
    """
    # to be pasted: not the path of this interpreter
    shown = shlex.join(("python", *command[1:]))
    print(f"\n$ {shown}", flush=True)
    # one thread for each rank, which torchrun would choose with a long warning; the user's own
    # variables come last and win
    environment = {"OMP_NUM_THREADS": "1", **MEET_IN_FILES, **os.environ}
    if code := subprocess.run(command, env=environment).returncode:
        raise ValueError(
            f"{name} ended with exit code {code}, what it said is above; started again, "
            "this resumes there"
        )


def main() -> None:
    """Parse and run."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["pretrain"]:
        from rft.demo.pretrain import pretrain

        chosen = cli.parse(Pretrain, args=arguments[1:], prog="rft.demo pretrain")
        pretrain(chosen.out, chosen.seed)
        return
    if arguments[:1] == ["paper"]:
        options = {"args": arguments[1:], "prog": "rft.demo paper", "description": PAPER}
        make(cli.parse(Demo, **options), "reproduction")
    else:
        # the experiments of the README's table
        make(cli.parse(Demo, args=arguments, prog="rft.demo"), "report", SHOWN, alphas=(0.5,))
