"""The paper's experiments in miniature: `python -m rft.demo` some of them, `... paper` all.

`... paper --suite post-2023` compares its method with those that came later.

Runs the commands that a cluster would run (pack, torchrun train, merge, torchrun evaluate, report)
on a small procedural world, and prints each. Whatever is already done is skipped.
"""

import sys
import time
from pathlib import Path
from typing import Annotated

from pydantic import Field

from rft import cli, recipes, stages
from rft.demo.miniature import FOLDER, prepare_data, shards
from rft.evaluate.results import is_current
from rft.experiments import Experiment, Study, Suite, experiments
from rft.loading.dataset import PackedDataset
from rft.report.page import write_report
from rft.runs import choice, filenames
from rft.sets import TEST_SETS
from rft.storage.documents import Epochs, Positive, Seed, document
from rft.train.command import parse
from rft.train.run import finished

SHOWN = ("zero-shot", "vanilla", "wise-ft", "no-mask", "object-mask-single-fill")
# what the stages import; the modules of their commands come by name
MODULES = (
    *("rft.train.command", "rft.train.finish", "rft.merge.command", "rft.merge.choose"),
    *("rft.evaluate.command", "rft.ensemble.command"),
)
# folders of the suites' reports
REPORTS: dict[Suite, str] = {"paper": "reproduction", "post-2023": "post-2023"}


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
    """Ranks that torchrun starts; 1 needs no torchrun, and is the fastest for a few epochs."""
    epochs: Epochs | None = None
    """Fine-tune for fewer epochs than the recipes do, to try the path."""


@document(name="--")
class Reproduction(Demo):
    """Run every experiment of the paper on the miniature world.

    All rows of Tables 1 and 3 and all models of Fig. 7; the table beside the paper's comes last.
    Data and runs are shared with the demo in the same folder.
    """

    suite: Suite = "paper"
    """The paper's experiments, or its method beside those that came later, on equal terms."""


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
    suite: Suite = "paper",
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
        suite=suite,
    )
    # without the last, the report, which this process makes itself
    *plan, _ = experiments(study)
    prepare_data(out)
    if arguments.processes == 1:
        stages.load(MODULES)
    for stage in plan:
        if is_done(stage, study.data):
            continue
        if arguments.processes == 1:
            # forked from this process: starting and importing takes longer than a short training
            stages.run_here(stage.name, stage.command[1:])
        else:
            stages.run(stage.name, stages.local(stage.command, arguments.processes))
    runs = [Path(path) for one in plan for path in one.makes]
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
    if module == "rft.merge.choose":
        saved = Path(options[options.index("--save") + 1])
        return saved.exists() and choice.is_current(choice.read(saved))
    manifests = {name: PackedDataset(f"{data}/{name}").manifest for name in TEST_SETS}
    if module == "rft.ensemble":
        return is_current(Path(options[options.index("--out") + 1]), manifests)
    assert module == "rft.evaluate"
    # the models stand first (rft.experiments.evaluate)
    models = [Path(path) for path in options[: options.index("--data")]]
    return all(is_current(path, manifests) for path in models)


def main() -> None:
    """Parse and run."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["pretrain"]:
        from rft.demo.pretrain import pretrain

        chosen = cli.parse(Pretrain, args=arguments[1:], prog="rft.demo pretrain")
        pretrain(chosen.out, chosen.seed)
        return
    if arguments[:1] == ["paper"]:
        chosen = cli.parse(Reproduction, args=arguments[1:], prog="rft.demo paper")
        make(chosen, REPORTS[chosen.suite], suite=chosen.suite)
    else:
        # the experiments of the README's table
        make(cli.parse(Demo, args=arguments, prog="rft.demo"), "report", SHOWN, alphas=(0.5,))
