"""`python -m rft.convert import`: makes a run folder of weights from other code.

rft/clip/weights.py lists the formats.
"""

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import open_clip
import tyro
from torch import Tensor

from rft import cli, dist
from rft import next_steps as commands
from rft.classes import Classes, check_head
from rft.clip import card, load, weights
from rft.clip.architecture import Architecture
from rft.clip.classifier import Saved, require_finite
from rft.clip.head import zero_shot_head
from rft.clip.model_folder import write_run
from rft.clip.weights import Weights
from rft.config import Device, ModelConfig
from rft.convert import text_tower
from rft.runs import derived, trained_on
from rft.runs.folder import unfinished
from rft.runs.records import RunConfig
from rft.runs.trained_on import TrainedOn
from rft.sets import ID_SET
from rft.shards.manifest import Manifest
from rft.storage import documents, files, urls
from rft.storage.documents import Seed, document

log = logging.getLogger(__name__)


@document(name="--")
class Import:
    """Make a run folder of weights from other code; no code in their file is ever executed.

    Weights without a classification head (OpenAI, open_clip) get a zero-shot head from the class
    names and prompts of a packed set: --data URL, and --set if it is not imagenet-val.
    """

    file: tyro.conf.Positional[str]
    """Weights file, folder in open_clip's hub layout, weights tag of --clip, or hf-hub:NAME."""
    out: Path
    """Run folder to make."""
    clip: str = ""
    """open_clip name of the model, e.g. ViT-B-32-quickgelu; needed if the file does not name it."""
    data: str = ""
    """Data root of the packed set with the class names."""
    packed: Annotated[str, tyro.conf.arg(name="set")] = ID_SET
    """Name of that set, below the data root."""
    recipe: str = "imported"
    """Name in the report; runs of one recipe with different seeds share a row."""
    seed: Seed = 0
    """Seed of the run in that row."""
    device: Device = "auto"
    """Device of the text tower that makes a head: 80,000 prompts take an hour on one CPU thread."""


@dataclass(frozen=True)
class Found:
    """The weights to import, and their metadata."""

    architecture: Architecture
    state: dict[str, Tensor]
    """`visual.*`, and `head.*` if the source has a head."""
    source: dict[str, Any]
    """The record of it in config.json."""
    text: ModelConfig | None
    """The settings that load its text tower; None if it has none."""
    classes: Classes | None
    """Classes of its head; None if it has no head or does not name them."""
    seen: frozenset[TrainedOn] | None = None
    """Its training sets; None if they are not recorded."""


def import_weights(arguments: Import) -> None:
    """Write a run folder of weights from other code.

    Raises:
        ValueError: if the weights cannot be read, do not fit the named model, or lack a head and
            --data names no class names, or if --out holds a different model.
    """
    arguments = dataclasses.replace(arguments, packed=urls.set_name(arguments.packed, "--set"))
    # checked first, so that no folder is written that other commands cannot read
    identity = {"recipe": arguments.recipe, "seed": arguments.seed}
    documents.decode(json.dumps(identity).encode(), RunConfig, "import")
    manifest = None
    if arguments.data:
        # a wrong URL fails here, before gigabytes of weights are read
        manifest = Manifest.load(files.join(arguments.data, arguments.packed), "--set")
    found = _find(arguments.file, arguments.clip)
    config: dict[str, Any] = {
        "recipe": arguments.recipe,
        "seed": arguments.seed,
        "model": {"clip": found.architecture.clip},
        "imported_from": found.source,
    }
    if "tag" in found.source:
        # an export finds the text tower by this tag
        config["model"]["pretrained"] = found.source["tag"]
    if manifest:
        config |= {"data": arguments.data, "train_set": arguments.packed}
        # a repacked set makes a different import
        config["imported_from"]["manifest_sha256"] = manifest.sha256
    out = str(arguments.out)
    if derived.is_complete(arguments.out, config):
        cli.say(f"already imported: {out}")
        return
    if reached := unfinished(Path(arguments.file)):
        log.warning(f"{arguments.file} belongs to a run that has not finished training ({reached})")
    state = _with_head(found, manifest, arguments)
    require_finite(Path(arguments.file), state)
    classes = _classes_of_head(found, manifest, arguments)
    # a header must have a step, and the number of steps of the other code is not known
    metadata = {"step": "0"} | ({} if found.seen is None else trained_on.entries(found.seen))
    metadata["recipe"] = arguments.recipe
    write_run(arguments.out, Saved(state, found.architecture, metadata, classes), config)
    rows = len(state["head.weight"])
    what = f"{found.source['format']}, {found.architecture.clip}, {rows} classes"
    cli.say(f"imported: {out} ({what})")
    cli.say_next(commands.evaluation([arguments.out], arguments.data, arguments.packed))


def _find(name: str, clip: str) -> Found:
    """Read the file, folder or tag that `import` names."""
    path = Path(name.removeprefix(load.LOCAL))
    # an existing file takes precedence over a tag of the same name
    if path.exists():
        return _from_file(path, clip)
    if name.startswith(load.HUB):
        return _from_tag(ModelConfig(clip=name, pretrained=""))
    if clip and open_clip.get_pretrained_cfg(clip, name):
        return _from_tag(ModelConfig(clip=clip, pretrained=name))
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(clip)) if clip else ""
    raise ValueError(f"no weights at {name}" + (f", and no tag of {clip}: {tags}" if tags else ""))


def _from_tag(model: ModelConfig) -> Found:
    loaded = load.load_clip(model)
    named = loaded.model.state_dict().items()
    state = {name: value for name, value in named if name.startswith("visual.")}
    source = {"format": "open_clip", "tag": model.pretrained, "text": True}
    return Found(loaded.architecture, state, source, model, None)


def _from_file(path: Path, clip: str) -> Found:
    read = weights.read(path)
    architecture = _architecture(path, read, clip)
    load.require_fit(read, architecture)
    # without a head the complete CLIP is loaded later, which also warns
    if read.config and read.head:
        load.warn_of_resize(str(path), read.config.preprocess_cfg)
    own = card.read(weights.card_path(path))
    if own and own.temperature is not None:
        log.warning(
            f"the temperature of {path}, {own.temperature:.4g}, is not imported; fit it again with "
            "python -m rft.evaluate --temperature, or use the export itself"
        )
    source = {
        "format": read.format,
        "path": str(path),
        "sha256": {file.name: files.sha256_file(file) for file in read.files},
        "text": bool(read.text),
    }
    text = text_tower.of_import(path, architecture) if read.text else None
    return Found(architecture, {**read.visual, **read.head}, source, text, read.classes, read.seen)


def _architecture(path: Path, read: Weights, clip: str) -> Architecture:
    """Find the named model's architecture, with the preprocessing of the weights, if any."""
    own = read.architecture
    if clip:
        named = load.architecture_of(clip)
        return dataclasses.replace(named, mean=own.mean, std=own.std) if own else named
    if own is None:
        names = ", ".join(load.names_of(read)) or "none that open_clip or rft knows"
        raise ValueError(
            f"{path} does not name its model ({read.geometry}); add --clip NAME; models of this "
            f"shape: {names}"
        )
    return own


def _with_head(found: Found, manifest: Manifest | None, arguments: Import) -> dict[str, Tensor]:
    """Return image tower and head; a missing head is made from class names."""
    file = arguments.file
    if "head.weight" in found.state:
        return found.state
    if found.text is None:
        raise ValueError(f"{file} has neither a classification head nor a text tower to make one")
    if manifest is None:
        raise ValueError(
            f"{file} has no classification head; its text tower makes one from the class names of "
            "a packed set: --data URL [--set SET]"
        )
    text_tower.require_named(found.text.clip, "--clip", arguments.clip, file)
    clip = load.load_clip(found.text)
    clip.model.to(dist.pick_device(arguments.device, dist.world_from_env()))
    head = zero_shot_head(clip, manifest.classes, manifest.templates).state_dict()
    return {**found.state, **{f"head.{name}": value.cpu() for name, value in head.items()}}


def _classes_of_head(found: Found, manifest: Manifest | None, arguments: Import) -> Classes | None:
    """Find the classes of an imported head; None, with a warning, if they are not known.

    If the file does not name the classes of its head, they are those of the packed set of --data.
    """
    file = arguments.file
    if "head.weight" not in found.state:  # the head was made from the set's names
        return manifest.label_space if manifest else None
    if manifest is None:
        if found.classes is None:
            log.warning(
                f"{file} does not name the classes of its head, so they cannot be checked; name a "
                "packed set of the same classes in the same order with --data URL --set NAME"
            )
        return found.classes
    rows, known = len(found.state["head.weight"]), manifest.label_space
    where = files.join(arguments.data, arguments.packed)
    for warning in check_head(found.classes, rows, file, known, where):
        log.warning(warning)
    return found.classes or known
