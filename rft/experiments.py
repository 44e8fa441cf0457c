"""The experiments as data: every command, and those that must finish before it.

They are those of the paper or, with `--suite post-2023`, a comparison with later methods.

`python -m rft.experiments --runs DIR --data URL` prints them, with `--lines` for a shell script.
Every command skips finished work, so all are safe to rerun. Commands that start with `torchrun` can
be given more ranks; those that start with `python` are single processes.

A run's folder is RUNS/<recipe>-seed<N>. In a WiSE family of several alphas, each model's folder is
RUNS/<family>-seed<N>/<family>-<alpha>. Runs of the later suite are in RUNS/post-2023.
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
# names that --only accepts, by suite
NAMES: dict[Suite, tuple[str, ...]] = {
    "paper": (*recipes.PAPER, *recipes.PAPER_MERGED),
    "post-2023": (*recipes.SUITE, *recipes.SUITE_MERGED, *recipes.ENSEMBLES),
}
# recipes that learn from a second teacher, a WiSE-FT model of the same seed
STUDENTS = tuple(name for name, one in recipes.PAPER.items() if one.method.kd_weight > 0)
# alpha of a WiSE-FT model if nothing chooses it, as its authors advise; WiSE-KD's teacher has it
ALPHA = 0.5
# training options that the plan sets
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
    """Names of the experiments whose results it needs."""
    makes: tuple[str, ...] = ()
    """Run folders that it makes for the report."""
    evaluates: bool = False
    """Whether it evaluates its own models; all others are evaluated together."""


@document(name="--")
class Study:
    """The requested experiments and their folders."""

    runs: str
    """Folder of the run folders."""
    data: str
    """Data root: folder or URL with the packed sets."""
    report: str = ""
    """Folder of the report; if not given, --runs with -report or -post-2023-report appended."""
    suite: Suite = "paper"
    """The paper's own experiments, or its method compared with later ones on equal terms: for each
    recipe, the held-out accuracy of seed 0 chooses among its declared values, for all seeds."""
    scale: Literal["paper", "miniature"] = "paper"
    """Defaults of the recipes."""
    preset: Preset = "paper"
    """official-parity also uses the last weights of a fine-tuned model for WiSE."""
    seeds: Annotated[Positive, Field(le=1000)] = 3
    """Number of fine-tuning seeds, starting at 0; the paper has three."""
    epochs: Epochs | None = None
    """Epochs of every training, instead of each recipe's own, for a short trial."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RECIPE...")] = ()
    """Run only these recipes, trained or merged, and those they build on; all if not given."""
    alphas: tyro.conf.Suppress[tuple[float, ...]] = recipes.ALPHAS
    """Shares of the fine-tuned model in each WiSE family."""
    options: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Further options for every training."""

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in NAMES[self.suite]:
                raise cli.unknown("recipe", name, sorted(NAMES[self.suite]))
        files.require_local(self.runs, "--runs")
        files.require_local(self.report, "--report")
        for option in self.options:
            # tyro takes hyphens and underscores
            if option.partition("=")[0].replace("_", "-") in PLANNED:
                raise ValueError(f"{option} is set by the plan for each training; leave it out")

    @property
    def workers(self) -> tuple[str, ...]:
        """Options of commands that evaluate: the miniature's images need no loader processes."""
        return ("--workers", "0") if self.scale == "miniature" else ()

    def at(self, name: str) -> str:
        """Path of a run, or of a choice among several."""
        return f"{self.root}/{name}"

    @property
    def root(self) -> str:
        """Folder of this suite's runs, apart from the paper's: a chosen setting may differ."""
        runs = self.runs.rstrip("/")
        return runs if self.suite == "paper" else f"{runs}/{self.suite}"

    def choice(self, recipe: str) -> str:
        """Path of the document that names a recipe's chosen run."""
        return self.at(f"{recipe}-choice.json")

    def wise_model(self, family: str, alpha: float, seed: int) -> str:
        """Path of one model of a WiSE family."""
        model = f"{family}-{alpha:g}"
        # as `rft.merge wise` writes: with one alpha --out is the model, with several a folder of
        # models
        if len(self.alphas) == 1:
            return self.at(with_seed(model, seed))
        return self.at(f"{with_seed(family, seed)}/{model}")


def experiments(study: Study) -> list[Experiment]:
    """List the plan's experiments, each after those it needs; the last one is the report."""
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
    # with --only zero-shot, which has no seeds, the later evaluations are empty
    evaluations = [evaluation for evaluation in evaluations if evaluation.after]
    counted = [*evaluations, *(one for one in found if one.evaluates)]
    return [*found, *evaluations, report(study, found, counted)]


def of_paper(study: Study) -> list[Experiment]:
    """List the trainings and merges of the paper's tables and figures."""
    others = [name for name in recipes.PAPER if name not in ("zero-shot", *STUDENTS)]
    found = [train(study, "zero-shot", 0)]  # no seed changes it
    for seed in range(study.seeds):
        # each after those it needs: a probe before lp-ft, trainings before merges before students
        found += [train(study, name, seed) for name in others]
        found += [ingredient(study, rate, seed) for rate in recipes.SOUP_RATES if rate != 1]
        found += [merge(study, name, seed) for name in recipes.PAPER_MERGED]
        found += [train(study, name, seed) for name in STUDENTS]
    return found


def on_equal_terms(study: Study) -> list[Experiment]:
    """List the trainings, choices and merges that compare later methods with the paper's.

    The values of a recipe are tried on seed 0, and its held-out images choose one. Every seed,
    including 0, is then trained with the chosen value.
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
    """List the trainings of seed 0 among which a recipe's setting is chosen."""
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
    """Make the choice among trainings by their held-out images."""
    runs = [study.at(one.name) for one in tried]
    command = ("python", "-m", "rft.merge.choose", *runs, "--data", study.data, *study.workers)
    command += ("--save", study.choice(recipe))
    return Experiment(f"{recipe}-choice", command, tuple(one.name for one in tried))


def with_seed(name: str, seed: int) -> str:
    """Name of an experiment, and of its run folder."""
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
    """Make the training of a recipe.

    With `part` and `options` it serves only a soup or a choice, and is not a row of the report.
    With `like` it uses the chosen setting.
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
    """Make the training of a soup's model: vanilla at `rate` times its learning rate."""
    (recipe,) = recipes.MERGED["uniform-soup"].inputs
    config = recipes.build(recipe, scale=study.scale, preset=study.preset)
    # the ingredient at rate 1 is vanilla itself, which is trained and reported anyway
    lr = f"{config.optim.lr * rate:g}"
    own: dict[str, Any] = {} if rate == 1 else {"part": f"-lr{lr}", "options": (recipes.RATE, lr)}
    return train(study, recipe, seed, **own)


def merge(study: Study, name: str, seed: int) -> Experiment:
    """Make the merge of a WiSE family, or of one seed's ingredients of a soup."""
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
            # of one seed, because runs of one seed share their held-out images
            after = tuple(ingredient(study, rate, seed).name for rate in recipes.SOUP_RATES)
            if merged.kind == "greedy-soup":
                # it evaluates held-out images, which ranks can share; a plain average is one
                # process
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
    """Make the evaluation of an ensemble of two models, with the settings of its paper."""
    kind, out = recipes.ENSEMBLES[name], study.at(with_seed(name, seed))
    start, end = kind.inputs
    after = (with_seed(start, 0), with_seed(end, seed))
    command = ("torchrun", "-m", "rft.ensemble", kind.kind, *map(study.at, after))
    command += ("--data", study.data, *study.workers, "--out", out)
    return Experiment(with_seed(name, seed), command, after, (out,), evaluates=True)


def with_needed(found: Sequence[Experiment], only: Collection[str]) -> list[Experiment]:
    """Select the experiments of some recipes and those they need, in the same order."""
    # a soup's ingredients, vanilla-lr..., are not recipes: they are selected with their soups
    wanted = {one.name for one in found if one.name.rpartition("-seed")[0] in only}
    # each comes after those it needs, so one pass from the end finds all
    for one in reversed(found):
        if one.name in wanted:
            wanted.update(one.after)
    return [one for one in found if one.name in wanted]


def evaluate(study: Study, found: Sequence[Experiment], seed: int) -> Experiment:
    """Make the evaluation of one seed's models, which are all in memory at once."""
    # the hyphen keeps seed 1 and seed 11 apart: -seed1 is not a suffix of -seed11
    models = [one for one in found if one.makes and not one.evaluates]
    mine = [one for one in models if one.name.endswith(with_seed("", seed))]
    models = [path for one in mine for path in one.makes]
    command = ("torchrun", "-m", "rft.evaluate", *models, "--data", study.data, *study.workers)
    return Experiment(with_seed("evaluate", seed), command, tuple(one.name for one in mine))


def report(
    study: Study, found: Sequence[Experiment], evaluations: Sequence[Experiment]
) -> Experiment:
    """Make the report on all models."""
    models = [path for one in found for path in one.makes]
    suite = "" if study.suite == "paper" else f"-{study.suite}"
    out = study.report or f"{study.runs.rstrip('/')}{suite}-report"
    command = ("python", "-m", "rft.report", *models, "--out", out, "--data", study.data)
    return Experiment("report", command, tuple(one.name for one in evaluations))


@dataclass(frozen=True)
class Arguments:
    """Print the commands of a comparison, each after those it needs.

    The default is the paper's Tables 1 and 3 and Fig. 7.

    Options after `--` are passed to every training: -- --model.clip ViT-B-16 --precision bf16
    """

    study: Annotated[Study, tyro.conf.arg(name="")]
    lines: bool = False
    """Print one line per experiment: its name, those it needs (separated by commas) and its
    command, separated by tabs."""


def text(found: Sequence[Experiment]) -> str:
    """Format a plan for reading."""
    lines = []
    for one in found:
        needs = f"  (after {', '.join(one.after)})" if one.after else ""
        lines += [f"{one.name}{needs}", f"    {shlex.join(one.command)}"]
    return "\n".join(lines)


def lines(found: Sequence[Experiment]) -> str:
    """Format a plan for shell scripts.

    Raises:
        ValueError: if a command has a line break or tab, which would end its line or column.
    """
    for word in (word for one in found for word in one.command):
        if set("\n\r\t") & set(word):
            raise ValueError(
                f"{short(word)} has a line break or tab, which --lines cannot represent"
            )
    return "\n".join(
        "\t".join((one.name, ",".join(one.after), shlex.join(one.command))) for one in found
    )


def main() -> None:
    """Parse and print."""
    words = sys.argv[1:]
    # split off before tyro sees them: they are rft.train's options, and rft.train checks them
    own = words[: words.index("--")] if "--" in words else words
    arguments = cli.parse(Arguments, args=own, prog="rft.experiments")
    study = replace(arguments.study, options=tuple(words[len(own) + 1 :]))
    found = experiments(study)
    print(lines(found) if arguments.lines else text(found))


if __name__ == "__main__":
    cli.run(main)
