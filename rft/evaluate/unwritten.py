"""Averages that are evaluated without writing their weights: `--wise` and `--soup`.

Each gets the run folder that `rft.merge` would make, without the weights. It has the same
config.json, and its results have the hash of the file that `rft.merge` would write. So these
results are current for the same merge in that folder, whether it is made earlier or later.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rft.averages import average
from rft.averages.average import Average, Parts
from rft.averages.ingredients import EndWeights
from rft.clip.classifier import Saved, map_state
from rft.runs import derived
from rft.runs.folder import checkpoint_path
from rft.storage import files


@dataclass(frozen=True)
class Unwritten:
    """An average, and the run folder for its results."""

    path: Path
    average: Average


# a model to evaluate: a run folder, a weights file, or an average of several
System = Path | Unwritten


def path_of(system: System) -> Path:
    """Return the run folder or weights file in or beside which the results are kept."""
    return system if isinstance(system, Path) else system.path


def header_of(system: System) -> Saved:
    """Read the header of a system's weights; tensors are mapped, not read."""
    if isinstance(system, Path):
        return map_state(checkpoint_path(system))
    # all models of an average have tensors of the same shapes and types, so one is enough
    return system.average.saved(system.average.models[0].saved.state)


def read_averages(
    wise: Sequence[Sequence[str]],
    soups: Sequence[Sequence[Path]],
    out: Path | None,
    end_weights: EndWeights,
    parts: Parts = "all",
) -> list[System]:
    """Prepare the averages of --wise and --soup; those already merged become their run folders.

    Args:
        wise: START, END and alphas of each --wise.
        soups: the models of each --soup.
        out: the folder for their run folders.
        end_weights: which weights of each END are averaged.
        parts: which parts of each WiSE model are interpolated.

    Raises:
        ValueError: if an option is malformed, models cannot be averaged, two averages have the same
            name, or a folder holds a different model.
    """
    if parts != "all" and not wise:
        raise ValueError(f"--parts {parts} needs --wise START END A...")
    if not wise and not soups:
        if out is not None:
            raise ValueError("--out needs --wise or --soup: it is the folder for their results")
        return []
    if out is None:
        raise ValueError("--wise and --soup need --out DIR, the folder for their results")
    paths = [_wise(words, end_weights, parts) for words in wise]
    found = [one for path in paths for one in path]
    found += [average.uniform_soup(models) for models in soups]
    first: dict[str, Average] = {}
    for one in found:
        if first.setdefault(one.name, one) is not one:
            models = (_models(same) for same in (first[one.name], one))
            raise ValueError(
                f"two averages are called {one.name}: of {' and of '.join(models)}; evaluate them "
                "with two commands and different --out"
            )
    systems = [_system(out / one.name, one) for one in found]
    for first_of_path, *_ in paths:
        average.warn_of_ends(*first_of_path.models)
    return systems


def _models(one: Average) -> str:
    return ", ".join(str(model.path) for model in one.models)


def _wise(words: Sequence[str], end_weights: EndWeights, parts: Parts) -> list[Average]:
    """Parse one --wise and prepare its averages."""
    if len(words) < 3 or "" in words:
        raise ValueError("--wise takes START END and one or more alphas, such as 0.25 0.5 0.75")
    start, end, *texts = words
    alphas = []
    for text in texts:
        try:
            alphas.append(float(text))
        except ValueError:
            raise ValueError(
                f"--wise takes START END and alphas, but {text!r} is not a number; models to "
                "evaluate unmerged come before --wise"
            ) from None
    for path in (start, end):
        files.require_local(path, "--wise")
    ends = Path(start), Path(end)
    return average.wise(*ends, alphas, end_weights, "an alpha of --wise", parts)


def _system(path: Path, one: Average) -> System:
    return path if derived.is_complete(path, one.config) else Unwritten(path, one)
