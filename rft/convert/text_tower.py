"""Where the text tower of a model comes from: rft fine-tunes and keeps the image tower alone."""

from collections.abc import Iterator
from pathlib import Path

import open_clip

from rft.clip import load
from rft.clip.architecture import Architecture
from rft.clip.load import PretrainedClip
from rft.config import ModelConfig
from rft.runs import records
from rft.runs.records import RunConfig

ANCESTORS = 200  # run folders of a merge that are searched for the origin of its text tower


def of_import(path: Path, architecture: Architecture) -> ModelConfig:
    """Return what loads the text tower of an imported file or folder."""
    if path.is_dir():
        return ModelConfig(clip=f"{load.LOCAL}{path}", pretrained="")
    return ModelConfig(clip=architecture.clip, pretrained=str(path))


def find(text: str, architecture: Architecture, config: RunConfig | None) -> PretrainedClip:
    """Return the CLIP that a model was made from, for its text tower.

    Args:
        text: the value of --text; if empty, the run's own origin is used.
        architecture: of the model.
        config: the run's config.json, if there is one.

    Raises:
        ValueError: if it is not to be found.
    """
    if load.names_folder(text):
        return load.load_clip(ModelConfig(clip=text, pretrained=""))
    if text:
        require_named(architecture.clip, "--text")
        if load.names_folder(architecture.clip):  # whose weights a tag or file would not replace
            return load.load_file(Path(text), architecture.clip)
        return load.load_clip(ModelConfig(clip=architecture.clip, pretrained=text))
    origin = next(_origins(config, architecture, set()), None)
    if origin is None and load.names_folder(architecture.clip):
        origin = ModelConfig(clip=architecture.clip, pretrained="")
    if origin is None:
        raise ValueError(
            f"no text tower is known for this {architecture.clip}; add --text "
            "TAG_OR_FILE (--text openai for a model that was made from OpenAI's)"
        )
    require_named(origin.clip, "--text")
    return load.load_clip(origin)


def base_model(text: str, architecture: Architecture, config: RunConfig | None) -> str | None:
    """Return the model of the hub that a model started from; None where that is not known.

    Args:
        text: the value of --text, which counts where the run does not record its origin.
        architecture: of the model.
        config: the run's config.json, if there is one.
    """
    # what the text tower is taken from is the next best guess
    named = text if load.names_folder(text) else architecture.clip
    origins = [*_origins(config, architecture, set()), ModelConfig(clip=named, pretrained=text)]
    for origin in origins:
        if (name := origin.clip).startswith(load.HUB):
            return name.removeprefix(load.HUB)
        if tag := open_clip.get_pretrained_cfg(name, origin.pretrained):
            # with a slash and a file's name, or none, behind it
            return str(tag.get("hf_hub", "")).rpartition("/")[0] or None
    return None


def require_untrained(config: RunConfig | None) -> None:
    """Check that no training which a model is made of has trained its text tower too.

    Raises:
        ValueError: if one has (FLYP): the pre-trained tower does not belong to such an image tower.
    """
    for one in _with_ancestors(config, set()):
        method = one.whole.get("method")
        if isinstance(method, dict) and method.get("loss") == "contrastive":
            raise ValueError(
                f"{one.recipe} trained its text tower as well (--method.loss contrastive), which "
                "only the checkpoints of that run have: this format needs it. --to safetensors and "
                "--to onnx export image tower and head"
            )


def _with_ancestors(config: RunConfig | None, seen: set[Path]) -> Iterator[RunConfig]:
    """Yield a run's configuration and those of the runs that it is merged from."""
    if config is None:
        return
    yield config
    for ancestor in config.merged_from or ():
        path = Path(ancestor.path).resolve()
        if path not in seen and len(seen) < ANCESTORS:
            seen.add(path)
            yield from _with_ancestors(records.find_config(path), seen)


def require_named(clip: str, option: str, *named: str) -> None:
    """Check that only models which the command line names are requested from the model hub.

    Weights and run folders are untrusted: the request would show their author who reads them.

    Args:
        clip: the model that they name.
        option: which option names it.
        named: what the command line names already.

    Raises:
        ValueError: if it is one of the hub and not named.
    """
    if clip.startswith(load.HUB) and clip not in named:
        raise ValueError(
            f"the weights name the model {clip}; the model hub is not asked for what weights name: "
            f"add {option} {clip} if you know it"
        )


def _origins(
    config: RunConfig | None, architecture: Architecture, seen: set[Path]
) -> Iterator[ModelConfig]:
    """Yield the CLIPs that a run, or the runs that it is merged from, started with.

    `seen` are the run folders that were looked at: a merge may name itself, or one folder in
    several ways.
    """
    for one in _with_ancestors(config, seen):
        # a training run; an import by tag has it, too
        if one.model.pretrained:
            yield ModelConfig(clip=architecture.clip, pretrained=one.model.pretrained)
        source = one.imported_from
        if source and source.text and source.path:
            yield of_import(Path(source.path), architecture)
