"""Coverage of 95% intervals in simulation: `python -m benchmarks.coverage [--save]`.

Sets of images are drawn at random from a population with known accuracies. An interval is computed
for each set, and those that contain the true value are counted:

    Wilson      of one accuracy, as `rft.statistics.accuracy.wilson`; compared with the textbook's
                plus or minus 1.96 standard errors;
    bootstrap   of a difference of two systems on the same images, as
                `rft.statistics.paired.bootstrap`: one set, the average of five sets of the OOD
                benchmarks' sizes, and systems that are means of three seeds;
    together    of a difference on versions of images, as in ImageNet-C, with the versions drawn
                together; compared with drawing each version as an independent image;
    seeds       of the mean accuracy of three seeds, also near 100%, where all images may be right.

An interval over images does not describe other training seeds. The last line is one JSON object.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from rft import cli
from rft.sets import BENCHMARKS, OOD_SETS
from rft.statistics.accuracy import LEVEL, wilson
from rft.statistics.paired import bootstrap, bootstrap_of, gains, tally
from rft.storage import files

RESULTS = Path(__file__).parent / "results"
SHARES = (0.02, 0.3, 0.76, 0.98)
TOTALS = (20, 200, 7500, 50_000)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Count how often intervals contain the true value."""

    draws: int = 10_000
    """Sets drawn per row of Wilson's table."""
    paired_draws: int = 2000
    """Sets drawn per row of the bootstrap's table."""
    replicates: int = 2000
    """Replicates of each bootstrap."""
    seed: int = 0
    save: bool = False
    """Also write the result to benchmarks/results/."""


def of_accuracies(arguments: Arguments) -> list[dict[str, Any]]:
    """Measure the coverage of intervals of one accuracy, for each accuracy and number of images."""
    draws, rows = np.random.default_rng(arguments.seed), []
    for share in SHARES:
        for total in TOTALS:
            counts, repeats = np.unique(
                draws.binomial(total, share, arguments.draws), return_counts=True
            )
            intervals = [wilson(int(count), total) for count in counts]
            inside = [one.low <= share <= one.high for one in intervals]
            found = counts / total
            error = 1.96 * np.sqrt(found * (1 - found) / total)
            textbook = np.abs(found - share) <= error
            rows.append(
                {
                    "share": share,
                    "images": total,
                    "wilson": round(float(np.average(inside, weights=repeats)), 4),
                    "textbook": round(float(np.average(textbook, weights=repeats)), 4),
                }
            )
    return rows


@dataclass(frozen=True)
class Population:
    """Kinds of images, with each seed's accuracy on them, for two systems."""

    weight_T: np.ndarray
    one_ST: np.ndarray
    two_ST: np.ndarray

    @property
    def gain(self) -> float:
        """Compute the true difference of the two systems, given these trainings."""
        return float(self.weight_T @ gains(self.one_ST, self.two_ST))

    def draw(self, images: int, draws: np.random.Generator) -> np.ndarray:
        """Draw images at random and return their gains, (N,)."""
        kind_N = draws.choice(len(self.weight_T), images, p=self.weight_T)
        return gains(self.one_ST, self.two_ST)[kind_N]


def population(
    accuracy: float, better: float, seeds: int, draws: np.random.Generator
) -> Population:
    """Draw kinds of images: easy ones are easy for all seeds of both systems."""
    kinds = 400
    hard_T = draws.uniform(size=kinds)
    noise = 0.08
    one_ST = hard_T + noise * draws.normal(size=(seeds, kinds)) < accuracy + better
    two_ST = hard_T + noise * draws.normal(size=(seeds, kinds)) < accuracy
    return Population(draws.dirichlet(np.full(kinds, 5.0)), one_ST, two_ST)


def of_differences(arguments: Arguments) -> list[dict[str, Any]]:
    """Measure the coverage of intervals of paired differences."""
    ood = tuple(BENCHMARKS[name].images for name in OOD_SETS)
    cases: list[tuple[str, Sequence[int], int]] = [
        ("one set of 200 images", (200,), 1),
        ("one set of 7,500 images", (7500,), 1),
        ("five sets of the OOD benchmarks' sizes", ood, 1),
        ("the same, three seeds", ood, 3),
        ("five sets of 300 images, three seeds", (300,) * 5, 3),
    ]
    rows = []
    for number, (name, sizes, seeds) in enumerate(cases):
        draws = np.random.default_rng([arguments.seed, number])
        kinds = [
            population(accuracy, 0.01, seeds, draws)
            for accuracy in np.linspace(0.45, 0.75, len(sizes))
        ]
        true = float(np.mean([one.gain for one in kinds]))
        inside, widths = 0, []
        for draw in range(arguments.paired_draws):
            sets = [one.draw(size, draws) for one, size in zip(kinds, sizes, strict=True)]
            found = bootstrap(sets, seed=draw, replicates=arguments.replicates).interval
            inside += found.low <= true <= found.high
            widths.append(found.high - found.low)
        rows.append(
            {
                "case": name,
                "true_points": round(100 * true, 3),
                "median_width_points": round(100 * float(np.median(widths)), 3),
                "bootstrap": round(inside / arguments.paired_draws, 4),
            }
        )
    return rows


def of_versions(arguments: Arguments) -> list[dict[str, Any]]:
    """Measure the coverage of differences on sets with several versions of each image."""
    rows = []
    for units, versions in ((10, 15), (50, 15), (500, 15), (500, 75)):
        draws = np.random.default_rng([arguments.seed, units, versions])
        kind = population(0.6, 0.05, versions, draws)
        inside = np.zeros(2)
        for draw in range(arguments.paired_draws):
            unit_N = draws.choice(len(kind.weight_T), units, p=kind.weight_T)
            # versions share the difficulty of their image, like seeds in a population
            one_VN, two_VN = kind.one_ST[:, unit_N], kind.two_ST[:, unit_N]
            size_N = np.full(units, versions)
            together = tally(one_VN.sum(axis=0), 1, two_VN.sum(axis=0), 1, size_N)
            apart = tally(one_VN.reshape(-1), 1, two_VN.reshape(-1), 1)
            for place, found in enumerate((together, apart)):
                made = bootstrap_of(
                    [found], np.random.default_rng(draw), replicates=arguments.replicates
                ).interval
                inside[place] += made.low <= kind.gain <= made.high
        shares = (inside / arguments.paired_draws).round(4).tolist()
        rows.append(
            {"images": units, "versions": versions, "together": shares[0], "apart": shares[1]}
        )
    return rows


def of_seeds(arguments: Arguments) -> list[dict[str, Any]]:
    """Measure the coverage of intervals of three seeds' mean accuracy."""
    rows = []
    for share in (0.6, 0.95, 0.99):
        for total in (20, 200, 2000):
            draws = np.random.default_rng([arguments.seed, total, int(100 * share)])
            # at these accuracies the decision boundary lies within the noise
            hard_T = draws.uniform(size=2000)
            right_ST = hard_T + 0.03 * draws.normal(size=(3, 2000)) < share
            true, inside = float(right_ST.mean()), 0
            for draw in range(arguments.paired_draws):
                right_SN = right_ST[:, draws.integers(2000, size=total)]
                found = bootstrap_of(
                    [tally(right_SN.sum(axis=0), 3)],
                    np.random.default_rng(draw),
                    replicates=arguments.replicates,
                ).interval
                inside += found.low <= true <= found.high
            rows.append(
                {
                    "share": round(true, 4),
                    "images": total,
                    "bootstrap": round(inside / arguments.paired_draws, 4),
                }
            )
    return rows


def measure(arguments: Arguments) -> dict[str, Any]:
    """Collect the document to save."""
    return {
        "benchmark": "coverage",
        **machine.describe(("rft/statistics",)),
        "level": LEVEL,
        **{name: value for name, value in asdict(arguments).items() if name != "save"},
        "accuracies": of_accuracies(arguments),
        "differences": of_differences(arguments),
        "together": of_versions(arguments),
        "seeds": of_seeds(arguments),
    }


def table(result: dict[str, Any]) -> str:
    """Format the result as Markdown."""
    lines = [
        f"Share of {result['draws']:,} drawn sets (differences: {result['paired_draws']:,}) whose "
        f"{result['level']:.0%} interval contains the true value. {machine.made(result)}.",
        "",
        "| true accuracy | images | Wilson | textbook |",
        "| --: | --: | --: | --: |",
    ]
    lines += [
        f"| {row['share']:.0%} | {row['images']:,} | {row['wilson']:.1%} | {row['textbook']:.1%} |"
        for row in result["accuracies"]
    ]
    lines += [
        "",
        "| difference of two systems | true, points | width, points | bootstrap |",
        "| --- | --: | --: | --: |",
    ]
    lines += [
        f"| {row['case']} | {row['true_points']:.2f} | {row['median_width_points']:.2f} "
        f"| {row['bootstrap']:.1%} |"
        for row in result["differences"]
    ]
    lines += [
        "",
        "| difference on versions of images | drawn together | each as an image |",
        "| --- | --: | --: |",
    ]
    lines += [
        f"| {row['images']:,} images in {row['versions']} versions | {row['together']:.1%} "
        f"| {row['apart']:.1%} |"
        for row in result["together"]
    ]
    lines += [
        "",
        "| true accuracy, mean of three seeds | images | bootstrap |",
        "| --: | --: | --: |",
    ]
    lines += [
        f"| {row['share']:.1%} | {row['images']:,} | {row['bootstrap']:.1%} |"
        for row in result["seeds"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and, with --save, write the result."""
    arguments = cli.parse(Arguments, prog="benchmarks.coverage")
    result = measure(arguments)
    if arguments.save:
        files.write_json(str(RESULTS / "coverage.json"), result)
        files.write_bytes(str(RESULTS / "coverage.md"), table(result).encode())
    print(table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
