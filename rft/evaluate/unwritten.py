"""Averages that are evaluated without writing their weights: `--wise` and `--soup`.

Each has a run folder as `rft.merge` makes it, less the weights: the same config.json, and results
that name the hash of the very file that `rft.merge` would write. So the same merge, made later or
earlier in that folder, finds them current.
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
    """An average, and the run folder that its results go to."""

    path: Path
    average: Average


# what is evaluated: a run folder, a weights file, or an average of some
System = Path | Unwritten


def path_of(system: System) -> Path:
    """Return the run folder or weights file that results are kept in or beside."""
    return system if isinstance(system, Path) else system.path


def header_of(system: System) -> Saved:
    """Return what is known of a system's weights before they are read; tensors are mapped."""
    if isinstance(system, Path):
        return map_state(checkpoint_path(system))
    # all ingredients have tensors of the same shapes and types
    return system.average.saved(system.average.models[0].saved.state)


def read_averages(
    wise: Sequence[Sequence[str]],
    soups: Sequence[Sequence[Path]],
    out: Path | None,
    end_weights: EndWeights,
    parts: Parts = "all",
) -> list[System]:
    """Return the averages that options name; one that is merged already is its run folder.

    Args:
        wise: START, END and alphas of each --wise.
        soups: the models of each --soup.
        out: the folder of their run folders.
        end_weights: of each END.
        parts: of each WiSE model, what is interpolated.

    Raises:
        ValueError: if an option is malformed, models cannot be averaged, two averages have one
            name, or a folder holds another model.
    """
    if parts != "all" and not wise:
        raise ValueError(f"--parts {parts} is what --wise interpolates; name one")
    if not wise and not soups:
        if out is not None:
            raise ValueError("--out is the folder for results of --wise and --soup; name one")
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
                f"two systems are called {one.name}: of {' and of '.join(models)}; evaluate them "
                "by two commands, each with an --out of its own"
            )
    systems = [_system(out / one.name, one) for one in found]
    for first_of_path, *_ in paths:
        average.warn_of_ends(*first_of_path.models)
    return systems


def _models(one: Average) -> str:
    return ", ".join(str(model.path) for model in one.models)


def _wise(words: Sequence[str], end_weights: EndWeights, parts: Parts) -> list[Average]:
    """Return the averages of one --wise."""
    if len(words) < 3 or "" in words:
        raise ValueError("--wise takes START END and one or more alphas, such as 0.25 0.5 0.75")
    start, end, *texts = words
    alphas = []
    for text in texts:
        try:
            alphas.append(float(text))
        except ValueError:
            raise ValueError(
                f"--wise takes START END and alphas, but {text!r} is no number; models to evaluate "
                "as they are come before it"
            ) from None
    for path in (start, end):
        files.require_local(path, "--wise")
    ends = Path(start), Path(end)
    return average.wise(*ends, alphas, end_weights, "an alpha of --wise", parts)


def _system(path: Path, one: Average) -> System:
    return path if derived.is_complete(path, one.config) else Unwritten(path, one)
