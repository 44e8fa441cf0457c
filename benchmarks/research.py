"""The research recipes on the miniature world: `python -m benchmarks.research`.

The trainings, choices and comparisons were specified before any run (docs/results.md, "Research
recipes"): the head's weight by held-out accuracy on two development seeds, then every recipe once
on five fresh seeds, and the paired differences in OOD average to the paper's method.

Commands run sequentially in this process, and finished work is skipped, so that an interrupted
measurement resumes.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from benchmarks import machine
from benchmarks.small_sets import call, spread
from rft import cli, recipes
from rft.demo.miniature import prepare_data, shards
from rft.evaluate import command as evaluation
from rft.runs import filenames, records
from rft.sets import BENCHMARKS, ID_SET, OOD_SETS
from rft.statistics.paired import holm
from rft.storage import files
from rft.train import command as training

RESULTS = Path(__file__).parent / "results"
NAME = "research"
DEVELOPMENT = (100, 101)
FRESH = (10, 11, 12, 13, 14)
WEIGHTS = (0.1, 1.0)
WEIGHTED = ("head-distillation", "counterfactual-plus")
CONTROL = "single-fill replacement"
BASELINE = recipes.DEFAULT
SYSTEMS = (BASELINE, CONTROL, *recipes.RESEARCH)
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Choose the head's weight on development seeds and compare the recipes on fresh ones."""

    folder: Path = Path("build/research")
    """Folder for the world and the runs."""
    epochs: int = 10
    """Fewer only test the pipeline; the result is saved for ten alone."""
    save: bool = False
    """Also write the result to benchmarks/results/."""


def train(arguments: Arguments, system: str, seed: int, weight: float) -> Path:
    """Train one run unless it is finished; return its folder."""
    recipe, options = system, []
    if system == CONTROL:
        recipe, options = BASELINE, ["--method.single-fill", "replacement"]
    name = f"{system.replace(' ', '-')}-seed{seed}"
    if system in WEIGHTED:
        options = ["--method.head-weight", weight]
        name = f"{system}-{weight:g}-seed{seed}"
    run = arguments.folder / "runs" / name
    where = ("--data", shards(arguments.folder), "--run-dir", run, "--scale", "miniature")
    call(
        training.main,
        *(recipe, *where, "--seed", seed, "--optim.epochs", arguments.epochs, *options),
    )
    return run


def held_out(run: Path) -> int:
    """Count the held-out images that the run's selected model classifies correctly."""
    return max(
        line.held_out_correct
        for _, line in records.read_metrics(run / filenames.METRICS)
        if line.held_out_correct is not None
    )


def choose_weight(arguments: Arguments) -> dict[str, Any]:
    """Train head-distillation on the development seeds; return the counts and the chosen weight."""
    counts = {
        weight: [
            held_out(train(arguments, "head-distillation", seed, weight)) for seed in DEVELOPMENT
        ]
        for weight in WEIGHTS
    }
    # max returns the first of equal ones, and the weights ascend
    chosen = max(WEIGHTS, key=lambda weight: sum(counts[weight]))
    return {"held_out_correct": {f"{w:g}": found for w, found in counts.items()}, "chosen": chosen}


def accuracies(run: Path) -> dict[str, float]:
    """Return a run's accuracy in % on each set, and the OOD average."""
    found = records.find(run / filenames.RESULTS, records.Results)
    assert found is not None, f"{run} was not evaluated"
    share = {name: 100 * one.correct / one.total for name, one in found.sets.items()}
    return share | {"ood": statistics.mean(share[name] for name in OOD_SETS)}


def paired(values: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Compare two systems seed by seed: mean, Student's interval and p-value."""
    gains = [one - other for one, other in zip(values, others, strict=True)]
    mean, count = statistics.mean(gains), len(gains)
    error = statistics.stdev(gains) / math.sqrt(count)
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, count - 1)) if error else float(mean == 0)
    return {"gains": gains, "mean": mean, "low": mean - half, "high": mean + half, "p": p}


def compare(systems: Mapping[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Compute the announced differences from each system's accuracies by seed."""
    ood = {name: [one["ood"] for one in found] for name, found in systems.items()}
    against = {name: paired(ood[name], ood[BASELINE]) for name in systems if name != BASELINE}
    corrected = holm([against[name]["p"] for name in recipes.RESEARCH])
    for name, p in zip(recipes.RESEARCH, corrected, strict=True):
        against[name]["holm"] = p
        against[name]["helps"] = p < 1 - LEVEL and against[name]["mean"] > 0
    return {
        "against": against,
        "unlike-donors against the control": paired(ood["unlike-donors"], ood[CONTROL]),
    }


def table(result: Mapping[str, Any]) -> str:
    """Format the result as Markdown."""
    names = (ID_SET, *OOD_SETS)
    head = [
        "recipe",
        *(BENCHMARKS[name].title for name in names),
        "OOD avg",
        "difference",
        "p (Holm)",
    ]
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    for system, found in result["systems"].items():
        cells = [spread([one[name] for one in found]) for name in (*names, "ood")]
        difference = result["against"].get(system)
        cells += ["-", "-"] if difference is None else [_interval(difference), _holm(difference)]
        lines.append([f"{system}", *cells])
    control = result["unlike-donors against the control"]
    choice = result["development"]
    counts = "; ".join(
        f"{weight}: {', '.join(map(str, found))}"
        for weight, found in choice["held_out_correct"].items()
    )
    weights = f"{choice['chosen']:g}, was chosen by the held-out images right on seeds "
    weights += f"{' and '.join(map(str, DEVELOPMENT))} ({counts})"
    note = (
        f"Top-1 accuracy in %, mean ± standard deviation over {len(FRESH)} seeds. The difference "
        f"is the mean over the seeds of the paired difference in OOD average to {BASELINE}, in "
        "points, with the 95% interval of Student's t; p-values of the four recipes are corrected "
        f"by Holm's rule. unlike-donors against the control: {_interval(control)}, p "
        f"{control['p']:.3f}. The head's weight, {weights}."
    )
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", note])


def _interval(found: Mapping[str, Any]) -> str:
    return f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def _holm(found: Mapping[str, Any]) -> str:
    return f"{found['holm']:.3f}" if "holm" in found else "-"


def main() -> None:
    """Parse, train, evaluate, print and save."""
    arguments = cli.parse(Arguments, prog="benchmarks.research")
    if arguments.save and arguments.epochs != Arguments.epochs:
        raise ValueError("--save wants the epochs that were announced: leave --epochs out")
    prepare_data(arguments.folder)
    development = choose_weight(arguments)
    runs = {
        system: [train(arguments, system, seed, development["chosen"]) for seed in FRESH]
        for system in SYSTEMS
    }
    every = [run for found in runs.values() for run in found]
    call(evaluation.main, *every, "--data", shards(arguments.folder), "--workers", 0)
    systems = {system: [accuracies(run) for run in found] for system, found in runs.items()}
    result = {"development": development, "systems": systems, **compare(systems)}
    print(table(result))
    if arguments.save:
        saved = {**machine.describe(), "seeds": FRESH, **result}
        files.write_json(str(RESULTS / f"{NAME}.json"), saved)
        files.write_bytes(str(RESULTS / f"{NAME}.md"), f"{table(result)}\n".encode())


if __name__ == "__main__":
    cli.run(main)
