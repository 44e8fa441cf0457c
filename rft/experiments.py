"""The experiments as data: every command, and which others must have ended before it.

Those of the paper, or with `--suite post-2023` its method beside those that came later.

`python -m rft.experiments --runs DIR --data URL` prints them, `--lines` for a shell script. Every
command skips what is done, so that all of them can be run twice. One that starts with `torchrun`
can be given more ranks, one that starts with `python` is a single process.

A run's folder is RUNS/<recipe>-seed<N>; of a WiSE family of several alphas, each model's is
RUNS/<family>-seed<N>/<family>-<alpha>. Those of the later suite are in RUNS/post-2023.
"""

import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, assert_never

import tyro
from pydantic import Field

from rft import cli, recipes
from rft.config import Preset
from rft.storage import files
from rft.storage.documents import Epochs, Positive, document
from rft.text import short

Suite = Literal["paper", "post-2023"]
# what --only may name, by suite
NAMES: dict[Suite, tuple[str, ...]] = {
    "paper": (*recipes.PAPER, *recipes.PAPER_MERGED),
    "post-2023": (*recipes.SUITE, *recipes.SUITE_MERGED, *recipes.ENSEMBLES),
}
# which learn from a second teacher, a WiSE-FT model of the same seed
STUDENTS = tuple(name for name, one in recipes.PAPER.items() if one.method.kd_weight > 0)
# of a WiSE-FT model where nothing chooses it, as its authors advise; WiSE-KD learns from that one
ALPHA = 0.5
# options of a training that the plan decides
PLANNED = (
    "--data", "--run-dir", "--run", "--seed", "--scale", "--preset", "--optim.epochs", "--optim.lr",
    "--model.start", "--method.kd-teacher", "--like",
)  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """One command of the plan."""

    name: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    """Names of the experiments that it needs the results of."""
    makes: tuple[str, ...] = ()
    """Run folders that the report shows."""
    evaluates: bool = False
    """Whether it counts the test images of what it makes; other models are evaluated together."""


@document(name="--")
class Study:
    """What is to be run where."""

    runs: str
    """Folder of the run folders."""
    data: str
    """Data root: the URL under which the tools wrote the packed sets."""
    report: str = ""
    """Folder of the report; --runs with -report behind it, or -post-2023-report, if not given."""
    suite: Suite = "paper"
    """The paper's own experiments; or its method beside those that came later, on equal terms: the
    held-out accuracy of seed 0 chooses from the values that each recipe declares, for all seeds."""
    scale: Literal["paper", "miniature"] = "paper"
    """Which numbers the recipes start from."""
    preset: Preset = "paper"
    """official-parity also takes the last weights of a fine-tuned model for WiSE."""
    seeds: Annotated[Positive, Field(le=1000)] = 3
    """Fine-tuning seeds, from 0 on; the paper has three."""
    epochs: Epochs | None = None
    """Epochs of everything that trains instead of each recipe's own, to try the path."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RECIPE...")] = ()
    """These recipes, trained or merged, and what they build on; all if not given."""
    alphas: tyro.conf.Suppress[tuple[float, ...]] = recipes.ALPHAS
    """Shares of the fine-tuned model in each WiSE family."""
    options: tyro.conf.Suppress[tuple[str, ...]] = ()
    """More options, for every training."""

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in NAMES[self.suite]:
                raise cli.unknown("recipe", name, sorted(NAMES[self.suite]))
        files.require_local(self.runs, "--runs")
        files.require_local(self.report, "--report")
        for option in self.options:
            # tyro takes hyphens and underscores
            if option.partition("=")[0].replace("_", "-") in PLANNED:
                raise ValueError(f"{option} cannot be the same in every training: the plan sets it")

    @property
    def workers(self) -> tuple[str, ...]:
        """Option of what counts: the miniature's images need no loader processes."""
        return ("--workers", "0") if self.scale == "miniature" else ()

    def at(self, name: str) -> str:
        """Return the path of a run, or of a choice among some."""
        return f"{self.root}/{name}"

    @property
    def root(self) -> str:
        """Folder of this suite's runs: a chosen setting may not be that of the paper's suite."""
        runs = self.runs.rstrip("/")
        return runs if self.suite == "paper" else f"{runs}/{self.suite}"

    def choice(self, recipe: str) -> str:
        """Return the path of the document that names a recipe's chosen run."""
        return self.at(f"{recipe}-choice.json")

    def wise_model(self, family: str, alpha: float, seed: int) -> str:
        """Return the path of one model of a WiSE family."""
        model = f"{family}-{alpha:g}"
        # where `rft.merge wise` writes: one alpha makes --out the model, several a folder of models
        if len(self.alphas) == 1:
            return self.at(with_seed(model, seed))
        return self.at(f"{with_seed(family, seed)}/{model}")


def experiments(study: Study) -> list[Experiment]:
    """Return the plan's experiments, each behind those it needs; the last one is the report."""
    if study.suite == "post-2023":
        study = replace(study, alphas=(ALPHA,))
    match study.suite:
        case "paper":
            found = of_paper(study)
        case "post-2023":
            found = on_equal_terms(study)
        case suite:
            assert_never(suite)
    if study.only:
        found = with_needed(found, study.only)
    evaluations = [evaluate(study, found, seed) for seed in range(study.seeds)]
    # without what is trained for each seed, the later seeds have nothing
    evaluations = [evaluation for evaluation in evaluations if evaluation.after]
    counted = [*evaluations, *(one for one in found if one.evaluates)]
    return [*found, *evaluations, report(study, found, counted)]


def of_paper(study: Study) -> list[Experiment]:
    """Return the trainings and merges of the paper's tables and figures."""
    others = [name for name in recipes.PAPER if name not in ("zero-shot", *STUDENTS)]
    found = [train(study, "zero-shot", 0)]  # which no seed changes
    for seed in range(study.seeds):
        # each after what it needs: a probe before lp-ft, trainings before merges before students
        found += [train(study, name, seed) for name in others]
        found += [ingredient(study, rate, seed) for rate in recipes.SOUP_RATES if rate != 1]
        found += [merge(study, name, seed) for name in recipes.PAPER_MERGED]
        found += [train(study, name, seed) for name in STUDENTS]
    return found


def on_equal_terms(study: Study) -> list[Experiment]:
    """Return the trainings, choices and merges that compare the later methods with the paper's.

    A recipe's values are tried on seed 0 and chosen from by its held-out images; every seed, that
    one too, is then trained with the chosen one.
    """
    found = [train(study, "zero-shot", 0)]
    trained = [name for name in recipes.SUITE if name != "zero-shot"]
    chosen = [name for name in trained if recipes.TRAINED[name].grid]
    for name in chosen:
        tried = grid(study, name)
        found += [*tried, choose(study, name, tried)]
    for seed in range(study.seeds):
        found += [train(study, name, seed, like=name in chosen) for name in trained]
        if any(recipes.MERGED[name].kind == "model-stock" for name in recipes.SUITE_MERGED):
            found += [ingredient(study, rate, seed) for rate in recipes.SOUP_RATES if rate != 1]
        found += [merge(study, name, seed) for name in recipes.SUITE_MERGED]
        found += [ensemble(study, name, seed) for name in recipes.ENSEMBLES]
    return found


def grid(study: Study, recipe: str) -> list[Experiment]:
    """Return the trainings of seed 0 that a recipe's setting is chosen from."""
    declared = recipes.TRAINED[recipe].grid
    assert declared is not None, f"{recipe} declares no values"
    option, values = declared
    config = recipes.build(recipe, scale=study.scale, preset=study.preset)
    unit = config.optim.lr if option == recipes.RATE else 1
    settings = [f"{value * unit:g}" for value in values]
    return [
        train(study, recipe, 0, part=f"-at{setting}", options=(option, setting))
        for setting in settings
    ]


def choose(study: Study, recipe: str, tried: Sequence[Experiment]) -> Experiment:
    """Return the choice among trainings by their held-out images."""
    runs = [study.at(one.name) for one in tried]
    command = ("python", "-m", "rft.merge.choose", *runs, "--data", study.data, *study.workers)
    command += ("--save", study.choice(recipe))
    return Experiment(f"{recipe}-choice", command, tuple(one.name for one in tried))


def with_seed(name: str, seed: int) -> str:
    """Return the name of an experiment, which is that of its run folder too."""
    return f"{name}-seed{seed}"


def train(
    study: Study,
    recipe: str,
    seed: int,
    *,
    part: str = "",
    options: tuple[str, ...] = (),
    like: bool = False,
) -> Experiment:
    """Return the training of a recipe.

    With a part of a name and options of its own it is for a soup or a choice alone, and no row of
    the report. With `like` it takes the setting that was chosen.
    """
    name, after = with_seed(f"{recipe}{part}", seed), ()
    if like:
        after, options = (f"{recipe}-choice",), ("--like", study.choice(recipe))
    elif recipe == "lp-ft":
        after = (with_seed("linear-probe", seed),)
        options = ("--model.start", study.at(after[0]))
    elif recipe in STUDENTS:
        after = (with_seed("wise-ft", seed),)
        options = ("--method.kd-teacher", study.wise_model("wise-ft", ALPHA, seed))
    command = ["torchrun", "-m", "rft.train", recipe]
    if study.scale != "paper":
        command += ["--scale", study.scale]
    if study.preset != "paper":
        command += ["--preset", study.preset]
    command += ["--data", study.data, "--run-dir", study.at(name), "--seed", str(seed), *options]
    # zero-shot refuses epochs (recipes.require_inputs)
    if study.epochs is not None and recipe != "zero-shot":
        command += ["--optim.epochs", str(study.epochs)]
    return Experiment(name, (*command, *study.options), after, () if part else (study.at(name),))


def ingredient(study: Study, rate: float, seed: int) -> Experiment:
    """Return the training of a soup's model: vanilla at `rate` times its learning rate."""
    (recipe,) = recipes.MERGED["uniform-soup"].inputs
    config = recipes.build(recipe, scale=study.scale, preset=study.preset)
    # the ingredient at rate 1 is vanilla itself, which is trained and reported anyway
    lr = f"{config.optim.lr * rate:g}"
    own: dict[str, Any] = {} if rate == 1 else {"part": f"-lr{lr}", "options": (recipes.RATE, lr)}
    return train(study, recipe, seed, **own)


def merge(study: Study, name: str, seed: int) -> Experiment:
    """Return the merge of all models of a WiSE family, or of a seed's ingredients of a soup."""
    merged, out = recipes.MERGED[name], study.at(with_seed(name, seed))
    launcher, options, models = "python", (), (out,)
    match merged.kind:
        case "wise":
            start, end = merged.inputs
            # zero-shot exists once, as seed 0
            after = (with_seed(start, 0), with_seed(end, seed))
            options = (*merged.options, "--alpha", *(f"{alpha:g}" for alpha in study.alphas))
            if study.preset == "official-parity":
                options += ("--end-weights", "last")
            models = tuple(study.wise_model(name, alpha, seed) for alpha in study.alphas)
            if len(models) == 1:
                (out,) = models
        case "uniform-soup" | "greedy-soup":
            # of one seed, because those share their held-out images
            after = tuple(ingredient(study, rate, seed).name for rate in recipes.SOUP_RATES)
            if merged.kind == "greedy-soup":
                # it counts held-out images, which ranks share; an average alone is one process
                launcher, options = "torchrun", ("--data", study.data, *study.workers)
        case "model-stock":
            rates = recipes.SOUP_RATES
            mine = tuple(ingredient(study, rate, seed).name for rate in rates)
            after = (with_seed(merged.inputs[0], 0), *mine)
        case kind:
            assert_never(kind)
    command = (launcher, "-m", "rft.merge", merged.kind, *map(study.at, after), *options)
    return Experiment(with_seed(name, seed), (*command, "--out", out), after, models)


def ensemble(study: Study, name: str, seed: int) -> Experiment:
    """Return the evaluation of two models that answer together, at the settings of its paper."""
    kind, out = recipes.ENSEMBLES[name], study.at(with_seed(name, seed))
    start, end = kind.inputs
    after = (with_seed(start, 0), with_seed(end, seed))
    command = ("torchrun", "-m", "rft.ensemble", kind.kind, *map(study.at, after))
    command += ("--data", study.data, *study.workers, "--out", out)
    return Experiment(with_seed(name, seed), command, after, (out,), evaluates=True)


def with_needed(found: Sequence[Experiment], only: Collection[str]) -> list[Experiment]:
    """Return the experiments of some recipes and those they need, in the order they had."""
    # a soup's ingredients, vanilla-lr..., are no recipes: they come with their soups
    wanted = {one.name for one in found if one.name.rpartition("-seed")[0] in only}
    # each stands behind those it needs, so one pass from the end finds all
    for one in reversed(found):
        if one.name in wanted:
            wanted.update(one.after)
    return [one for one in found if one.name in wanted]


def evaluate(study: Study, found: Sequence[Experiment], seed: int) -> Experiment:
    """Return the evaluation of a seed's models: those are all in memory at once."""
    # with its hyphen: -seed1 does not end what ends in -seed11
    models = [one for one in found if one.makes and not one.evaluates]
    mine = [one for one in models if one.name.endswith(with_seed("", seed))]
    models = [path for one in mine for path in one.makes]
    command = ("torchrun", "-m", "rft.evaluate", *models, "--data", study.data, *study.workers)
    return Experiment(with_seed("evaluate", seed), command, tuple(one.name for one in mine))


def report(
    study: Study, found: Sequence[Experiment], evaluations: Sequence[Experiment]
) -> Experiment:
    """Return the report on all models."""
    models = [path for one in found for path in one.makes]
    suite = "" if study.suite == "paper" else f"-{study.suite}"
    out = study.report or f"{study.runs.rstrip('/')}{suite}-report"
    command = ("python", "-m", "rft.report", *models, "--out", out, "--data", study.data)
    return Experiment("report", command, tuple(one.name for one in evaluations))


@dataclass(frozen=True)
class Arguments:
    """Print the commands of a comparison, each behind those it needs.

    By default those of the paper's Tables 1 and 3 and Fig. 7.

    What follows `--` goes to every training: -- --model.clip ViT-B-16 --precision bf16
    """

    study: Annotated[Study, tyro.conf.arg(name="")]
    lines: bool = False
    """One line an experiment: its name, those it needs (commas between), its command; tabs between
    the three."""


def text(found: Sequence[Experiment]) -> str:
    """Return a plan for people."""
    lines = []
    for one in found:
        needs = f"  (after {', '.join(one.after)})" if one.after else ""
        lines += [f"{one.name}{needs}", f"    {shlex.join(one.command)}"]
    return "\n".join(lines)


def lines(found: Sequence[Experiment]) -> str:
    """Return a plan for shell scripts.

    Raises:
        ValueError: if a command has a line break or tab, which would end its line or column.
    """
    for word in (word for one in found for word in one.command):
        if set("\n\r\t") & set(word):
            raise ValueError(
                f"{short(word)} has a line break or tab, which a plan of one line for "
                "each experiment cannot hold"
            )
    return "\n".join(
        "\t".join((one.name, ",".join(one.after), shlex.join(one.command))) for one in found
    )


def main() -> None:
    """Parse and print."""
    words = sys.argv[1:]
    # cut off before tyro sees them: they are rft.train's options, and checked by it
    own = words[: words.index("--")] if "--" in words else words
    arguments = cli.parse(Arguments, args=own, prog="rft.experiments")
    study = replace(arguments.study, options=tuple(words[len(own) + 1 :]))
    found = experiments(study)
    print(lines(found) if arguments.lines else text(found))


if __name__ == "__main__":
    cli.run(main)
