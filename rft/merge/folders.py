"""What a merge reads and what it leaves: ingredients, and the run folder of their average.

An ingredient is known by the sha256 of its weights, so that a run may move between two calls.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rft import files
from rft.clip.classifier import SELECTED, load_state, save_state
from rft.clip.load import Architecture
from rft.method.averaging import require_alike

SHOWN = 3  # differences that an error tells


@dataclass(frozen=True, kw_only=True)
class Ingredient:
    """One model to average: where it is and what made it."""

    path: Path
    """The run folder or weights file that the user named."""
    weights: Path
    sha256: str
    config: dict[str, Any]
    """The run folder's config.json; empty for a weights file."""
    metadata: dict[str, str]
    """The weights file's own: recipe, step."""
    architecture: Architecture

    @property
    def recipe(self) -> str:
        """Name of the recipe, empty if nothing tells it."""
        return self.config.get("recipe") or self.metadata.get("recipe", "")

    @property
    def seed(self) -> int:
        """Seed of the run, 0 for a weights file."""
        return self.config.get("seed", 0)

    @property
    def is_training_run(self) -> bool:
        """Whether rft.train made it; a merged or imported model and a weights file are not."""
        return "optim" in self.config

    def load(self) -> dict[str, Tensor]:
        """Return the weights."""
        return load_state(self.weights)[0]

    def record(self) -> dict[str, Any]:
        """Return what a merged model's config.json keeps of it."""
        return {"path": str(self.path), "sha256": self.sha256}


def read_ingredient(path: Path, weights: Path = SELECTED) -> Ingredient:
    """Return the ingredient at `path`; `weights` is which file of a run folder is meant.

    Raises:
        ValueError: if there is none, or it is a run that is still training.
    """
    config: dict[str, Any] = {}
    if (path / "config.json").is_file():
        config = _read_config(path)
        if "optim" in config and not (path / "training.json").is_file():
            raise ValueError(
                f"{path} has not finished training; resume it first, or name one of its "
                "checkpoints/*.safetensors itself"
            )
    file = path / weights if path.is_dir() else path
    _, architecture, metadata = load_state(file)
    return Ingredient(
        path=path,
        weights=file,
        sha256=files.sha256_file(file),
        config=config,
        metadata=metadata,
        architecture=architecture,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    config = files.read_json(str(folder / "config.json"))
    if not isinstance(config, dict) or "recipe" not in config:
        raise ValueError(f"{folder} is not a run folder: its config.json names no recipe")
    return config


def read_soup(paths: Sequence[Path]) -> list[Ingredient]:
    """Return the ingredients of a soup.

    Raises:
        ValueError: if there are fewer than two, one is there twice, or they are not alike.
    """
    if len(paths) < 2:
        raise ValueError(f"a soup needs at least two models, {len(paths)} named")
    ingredients = [read_ingredient(path) for path in paths]
    seen: dict[str, Path] = {}
    for ingredient in ingredients:
        other = seen.setdefault(ingredient.sha256, ingredient.path)
        if other is not ingredient.path:
            raise ValueError(f"{other} and {ingredient.path} are the same weights; name one")
    check_alike(ingredients)
    return ingredients


def check_alike(ingredients: Sequence[Ingredient]) -> None:
    """Check that models can be averaged with the first, before any work is done.

    Raises:
        ValueError: naming two models and what differs.
    """
    first = ingredients[0]
    state = first.load()  # mapped from the file, no weight is read
    for other in ingredients[1:]:
        both = f"{first.path} and {other.path}"
        if changed := files.difference(_shape(first), _shape(other)):
            raise ValueError(f"{both} have other architectures: {'; '.join(changed[:SHOWN])}")
        try:
            require_alike(state, other.load())
        except ValueError as error:
            raise ValueError(f"{both}: {error}") from error


def _shape(ingredient: Ingredient) -> dict[str, Any]:
    """Return what must be equal; the CLIP's name may be a folder that lay elsewhere."""
    document = asdict(ingredient.architecture)
    return {name: value for name, value in document.items() if name != "clip"}


def shared_seed(ingredients: Sequence[Ingredient]) -> int:
    """Return the seed of all ingredients, 0 if they have several."""
    seeds = {ingredient.seed for ingredient in ingredients}
    return seeds.pop() if len(seeds) == 1 else 0


def is_merged(out: Path, config: dict[str, Any]) -> bool:
    """Whether the run folder already holds this merge, complete.

    Raises:
        ValueError: if it holds anything else.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; choose another")
    path = out / "config.json"
    if not path.is_file():
        # what a killed writer left is hidden
        if out.is_dir() and any(not found.name.startswith(".") for found in out.iterdir()):
            raise ValueError(f"{out} has files in it but is no run folder; choose another --out")
        return False
    old = _read_config(out)
    if "merged_from" not in old:
        kind = "a training run" if "optim" in old else "another model"
        raise ValueError(f"{out} holds {kind}; choose another --out")
    # a merge that stopped before its weights were there left nothing that another could spoil
    if not (out / SELECTED).is_file():
        return False
    if changed := files.difference(_identity(old), _identity(config)):
        raise ValueError(
            f"{out} holds another merge: {'; '.join(changed[:SHOWN])}; choose another --out"
        )
    return (out / "provenance.json").is_file()


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a merge's config.json that is known before it is done."""
    sha256 = [record["sha256"] for record in config["merged_from"]]
    known = {name: value for name, value in config.items() if name != "soup"}
    return {**known, "merged_from": {str(n): digest[:12] for n, digest in enumerate(sha256)}}


def write_merged(
    out: Path,
    state: dict[str, Tensor],
    architecture: Architecture,
    config: dict[str, Any],
    metadata: dict[str, str],
) -> None:
    """Write a merged model's run folder; provenance.json comes last and says that it is whole."""
    files.write_json(f"{out}/config.json", config)
    metadata = {**metadata, "recipe": config["recipe"]}
    save_state(f"{out}/{SELECTED}", state, architecture, metadata)
    files.write_json(f"{out}/provenance.json", files.provenance())
