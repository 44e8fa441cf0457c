"""Finds the text tower of a model, because rft fine-tunes and keeps the image tower alone."""

from collections.abc import Iterator
from pathlib import Path

import open_clip

from rft.clip import load
from rft.clip.architecture import Architecture
from rft.clip.load import PretrainedClip
from rft.config import ModelConfig
from rft.runs import records
from rft.runs.records import RunConfig

ANCESTORS = 200  # limit of a merge's run folders that are searched for the text tower's origin


def of_import(path: Path, architecture: Architecture) -> ModelConfig:
    """Make the settings that load the text tower of an imported file or folder."""
    if path.is_dir():
        return ModelConfig(clip=f"{load.LOCAL}{path}", pretrained="")
    return ModelConfig(clip=architecture.clip, pretrained=str(path))


def find(text: str, architecture: Architecture, config: RunConfig | None) -> PretrainedClip:
    """Load the CLIP that a model was made from, for its text tower.

    Args:
        text: the value of --text; if empty, the run's own origin is used.
        architecture: the architecture of the model.
        config: the run's config.json, if there is one.

    Raises:
        ValueError: if it cannot be found.
    """
    if load.names_folder(text):
        return load.load_clip(ModelConfig(clip=text, pretrained=""))
    if text:
        require_named(architecture.clip, "--text")
        # load_clip would take the weights of such a folder instead of the file
        if load.names_folder(architecture.clip):
            return load.load_file(Path(text), architecture.clip)
        return load.load_clip(ModelConfig(clip=architecture.clip, pretrained=text))
    origin = next(_origins(config, architecture, set()), None)
    if origin is None and load.names_folder(architecture.clip):
        origin = ModelConfig(clip=architecture.clip, pretrained="")
    if origin is None:
        raise ValueError(
            f"the text tower of this {architecture.clip} is not recorded; add --text "
            "TAG_OR_FILE, such as --text openai for a model from OpenAI's weights (docs/export.md)"
        )
    require_named(origin.clip, "--text")
    return load.load_clip(origin)


def base_model(text: str, architecture: Architecture, config: RunConfig | None) -> str | None:
    """Find the hub model that a model started from; None if that is not known.

    Args:
        text: the value of --text, used if the run does not record its origin.
        architecture: the architecture of the model.
        config: the run's config.json, if there is one.
    """
    # without a recorded origin, the source of the text tower is the best guess
    named = text if load.names_folder(text) else architecture.clip
    origins = [*_origins(config, architecture, set()), ModelConfig(clip=named, pretrained=text)]
    for origin in origins:
        if (name := origin.clip).startswith(load.HUB):
            return name.removeprefix(load.HUB)
        if tag := open_clip.get_pretrained_cfg(name, origin.pretrained):
            # an entry is USER/NAME/FILE, or USER/NAME/ without a file
            return str(tag.get("hf_hub", "")).rpartition("/")[0] or None
    return None


def require_untrained(config: RunConfig | None) -> None:
    """Check that no training of a model, or of the models it is merged from, trained a text tower.

    Raises:
        ValueError: if one has (FLYP): the pre-trained tower does not belong to such an image tower.
    """
    for one in _with_ancestors(config, set()):
        method = one.whole.get("method")
        if isinstance(method, dict) and method.get("loss") == "contrastive":
            raise ValueError(
                f"{one.recipe} trained its text tower as well (--method.loss contrastive); this "
                "format needs it, and only the checkpoints of that run have it. Export image tower "
                "and head with --to safetensors or --to onnx (docs/export.md)"
            )


def _with_ancestors(config: RunConfig | None, seen: set[Path]) -> Iterator[RunConfig]:
    """Yield the configuration of a run, and of all runs that it is merged from."""
    if config is None:
        return
    yield config
    for ancestor in config.merged_from or ():
        path = Path(ancestor.path).resolve()
        if path not in seen and len(seen) < ANCESTORS:
            seen.add(path)
            yield from _with_ancestors(records.find_config(path), seen)


def require_named(clip: str, option: str, *named: str) -> None:
    """Check that only models named on the command line are requested from the model hub.

    Weights and run folders are untrusted, and a request would reveal their reader to their author.

    Args:
        clip: the model that the weights name.
        option: the option with which the user can name it.
        named: the models that the command line already names.

    Raises:
        ValueError: if it is a model of the hub and the command line does not name it.
    """
    if clip.startswith(load.HUB) and clip not in named:
        raise ValueError(
            f"the weights name the model {clip}, and only models on the command line are "
            f"requested from the hub: add {option} {clip} if you trust it "
            "(docs/security.md#what-weights-and-run-folders-can-request)"
        )


def _origins(
    config: RunConfig | None, architecture: Architecture, seen: set[Path]
) -> Iterator[ModelConfig]:
    """Yield the CLIPs that a run, or the runs that it is merged from, started with.

    `seen` are the run folders already visited: a merge may name itself, or one folder by several
    paths.
    """
    for one in _with_ancestors(config, seen):
        # set in training runs and in imports by tag
        if one.model.pretrained:
            yield ModelConfig(clip=architecture.clip, pretrained=one.model.pretrained)
        source = one.imported_from
        if source and source.text and source.path:
            yield of_import(Path(source.path), architecture)
