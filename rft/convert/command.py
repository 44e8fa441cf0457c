"""Bring weights of other code in, take weights out: `python -m rft.convert import|export ...`.

    python -m rft.convert import FILE --out RUN --clip ViT-B-32-quickgelu [--data URL]
    python -m rft.convert export RUN --to open-clip --out FOLDER

`import` makes a run folder, which rft.evaluate, rft.merge and rft.report take like one that was
trained here. The format is told from the file's content; which there are is in rft/clip/weights.py.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import open_clip
import tyro
from safetensors.torch import save
from torch import Tensor

from rft import cli, dist
from rft import next_steps as commands
from rft.classes import Classes, check_head
from rft.clip import card, load, weights
from rft.clip.architecture import Architecture
from rft.clip.card import Format
from rft.clip.classifier import load_state, require_finite
from rft.clip.head import zero_shot_head
from rft.clip.load import PretrainedClip
from rft.clip.model_folder import write_run
from rft.clip.weights import Weights
from rft.config import Device, ModelConfig
from rft.runs import derived, records, trained_on
from rft.runs.folder import (
    checkpoint_path,
    read_results,
    require_current,
    require_own_weights,
    unfinished,
)
from rft.runs.records import RunConfig
from rft.runs.trained_on import TrainedOn
from rft.sets import ID_SET
from rft.shards.manifest import Manifest
from rft.storage import documents, files, urls
from rft.storage.documents import Seed, document

ANCESTORS = 200  # run folders of a merge that are searched for the origin of its text tower
SUFFIXES = {"released": ".pt", "model-soups": ".pt", "safetensors": ".safetensors"}

USAGE = """Bring weights of other code in, take weights out.

usage: python -m rft.convert import FILE --out RUN [--clip NAME] [--data URL]
       python -m rft.convert export RUN_OR_FILE --to FORMAT --out PATH [--text TAG_OR_FILE]

import  OpenAI's .pt, open_clip's .pt, .bin, .safetensors, hub-layout folder, weights tag or
        hf-hub:NAME, model-soups' state dict, the released code's checkpoint, wise-ft's pickle,
        safetensors of rft -> a run folder
export  a run folder or .safetensors file -> open-clip, released, model-soups, safetensors

`import --help` and `export --help` tell more
"""


@document(name="--")
class Import:
    """Make a run folder of weights that other code saved; nothing in their file is ever run.

    Weights without a classification head (OpenAI, open_clip) get the zero-shot head of the class
    names and prompts of a packed set: --data URL, and --set if it is not imagenet-val.
    """

    file: tyro.conf.Positional[str]
    """Weights file, folder in open_clip's hub layout, weights tag of --clip, or hf-hub:NAME."""
    out: Path
    """Run folder to make."""
    clip: str = ""
    """open_clip name of the model, e.g. ViT-B-32-quickgelu; needed where the file does not tell."""
    data: str = ""
    """Data root whose packed set gives the class names."""
    packed: Annotated[str, tyro.conf.arg(name="set")] = ID_SET
    """Name of that set, below the data root."""
    recipe: str = "imported"
    """What the report calls it; runs of one recipe with other seeds share a row."""
    seed: Seed = 0
    """Which of these it is."""
    device: Device = "auto"
    """Where the text tower makes a head: 80,000 prompts take an hour on one CPU thread."""


@dataclass(frozen=True)
class Export:
    """Write a model in a format of other code, and a card (JSON) that says what it is.

    open-clip: a folder that open_clip.create_model_and_transforms("local-dir:PATH") loads, with the
    fine-tuned image tower and the original text tower; the classification head lies beside, in
    head.safetensors.

    released: a checkpoint (.pt) of the code released with the paper.

    model-soups: a state dict (.pt) of model-soups.

    safetensors: rft's own weights file, which rft.evaluate takes too.
    """

    source: tyro.conf.Positional[Path]
    """Run folder (its selected model, or the last without held-out images) or .safetensors file."""
    to: Annotated[Format, tyro.conf.arg(name="to")]
    """The format."""
    out: Path
    """Folder (open-clip) or file to write."""
    text: str = ""
    """Where the text tower comes from, if not from what the run started with: a weights tag or file
    (open-clip, model-soups)."""


@dataclass(frozen=True)
class Found:
    """What `import` works with."""

    architecture: Architecture
    state: dict[str, Tensor]
    """`visual.*`, and `head.*` if the source has a head."""
    source: dict[str, Any]
    """What config.json tells about it."""
    text: ModelConfig | None
    """What loads its text tower; None if it has none."""
    classes: Classes | None
    """Classes of its head; None if it has none or does not say."""
    seen: frozenset[TrainedOn] | None = None
    """What it was trained on; None if it does not say."""


def main() -> None:
    """Parse and convert."""
    kind, *options = sys.argv[1:] or ["--help"]
    if kind in ("-h", "--help"):
        print(USAGE)
    elif kind == "import":
        import_weights(cli.parse(Import, args=options, prog="rft.convert import"))
    elif kind == "export":
        export_weights(cli.parse(Export, args=options, prog="rft.convert export"))
    else:
        raise cli.unknown("conversion", kind, ["import", "export"])


def import_weights(arguments: Import) -> None:
    """Write the run folder of weights that other code saved.

    Raises:
        ValueError: if they cannot be read, do not fit the named model, lack a head that --data does
            not give, or the folder holds something else.
    """
    arguments = dataclasses.replace(arguments, packed=urls.set_name(arguments.packed, "--set"))
    # a folder that no command reads is not written
    identity = {"recipe": arguments.recipe, "seed": arguments.seed}
    documents.decode(json.dumps(identity).encode(), RunConfig, "import")
    manifest = None
    if arguments.data:
        manifest = Manifest.load(files.join(arguments.data, arguments.packed))
    found = find(arguments.file, arguments.clip)
    config: dict[str, Any] = {
        "recipe": arguments.recipe,
        "seed": arguments.seed,
        "model": {"clip": found.architecture.clip},
        "imported_from": found.source,
    }
    if "tag" in found.source:
        config["model"]["pretrained"] = found.source["tag"]
    if manifest:
        config |= {"data": arguments.data, "train_set": arguments.packed}
        config["imported_from"]["manifest_sha256"] = manifest.sha256
    out = str(arguments.out)
    if derived.is_complete(arguments.out, config):
        cli.say(f"already imported: {out}")
        return
    if reached := unfinished(Path(arguments.file)):
        cli.warn(f"{arguments.file} is of a run that has not finished training ({reached})")
    state = with_head(found, manifest, arguments)
    require_finite(Path(arguments.file), state)
    classes = classes_of_head(found, manifest, arguments)
    metadata = {"step": "0"} | ({} if found.seen is None else trained_on.entries(found.seen))
    write_run(arguments.out, state, found.architecture, config, metadata, classes)
    rows = len(state["head.weight"])
    what = f"{found.source['format']}, {found.architecture.clip}, {rows} classes"
    cli.say(f"imported: {out} ({what})")
    cli.say(commands.evaluation([arguments.out], arguments.data, arguments.packed))


def find(name: str, clip: str) -> Found:
    """Read what `import` was pointed at.

    Raises:
        ValueError: if there is no such file, folder or tag, or it does not fit the named model.
    """
    path = Path(name.removeprefix(load.LOCAL))
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
    if read.config and read.head:  # without a head the whole CLIP is loaded, which warns too
        load.warn_of_resize(str(path), read.config.preprocess_cfg)
    source = {
        "format": read.format,
        "path": str(path),
        "sha256": {file.name: files.sha256_file(file) for file in read.files},
        "text": bool(read.text),
    }
    text = _text_of(path, architecture) if read.text else None
    return Found(architecture, {**read.visual, **read.head}, source, text, read.classes, read.seen)


def _architecture(path: Path, read: Weights, clip: str) -> Architecture:
    """Return the named model, with the preprocessing that the weights come with, if any."""
    own = read.architecture
    if own is None and read.config:
        own = load.describe(f"{load.LOCAL}{path}")
    if clip:
        named = load.describe(clip)
        return dataclasses.replace(named, mean=own.mean, std=own.std) if own else named
    if own is None:
        names = ", ".join(load.names_of(read)) or "none that open_clip knows"
        raise ValueError(
            f"{path} does not name its model ({read.geometry}); add --clip NAME, by its shape one "
            f"of: {names}"
        )
    return own


def _text_of(path: Path, architecture: Architecture) -> ModelConfig:
    """Return what loads the text tower of an imported file or folder."""
    if path.is_dir():
        return ModelConfig(clip=f"{load.LOCAL}{path}", pretrained="")
    return ModelConfig(clip=architecture.clip, pretrained=str(path))


def with_head(found: Found, manifest: Manifest | None, arguments: Import) -> dict[str, Tensor]:
    """Return image tower and head; the head is made of class names where there is none.

    Raises:
        ValueError: if there is neither a head nor what makes one.
    """
    file = arguments.file
    if "head.weight" in found.state:
        return found.state
    if found.text is None:
        raise ValueError(f"{file} has neither a classification head nor a text tower to make one")
    if manifest is None:
        raise ValueError(
            f"{file} has no classification head; its text tower makes one of the class names of a "
            "packed set: --data URL [--set imagenet-val]"
        )
    require_named(found.text.clip, "--clip", arguments.clip, file)
    clip = load.load_clip(found.text)
    clip.model.to(dist.pick_device(arguments.device, dist.world_from_env()))
    head = zero_shot_head(clip, manifest.classes, manifest.templates).state_dict()
    return {**found.state, **{f"head.{name}": value.cpu() for name, value in head.items()}}


def classes_of_head(found: Found, manifest: Manifest | None, arguments: Import) -> Classes | None:
    """Return the classes of an imported head; None, with a warning, if nothing names them.

    A head whose file does not name its classes has those of the packed set that --data names.

    Raises:
        ValueError: if file and data have different classes.
    """
    file = arguments.file
    if "head.weight" not in found.state:  # made of the set's names
        return manifest.label_space if manifest else None
    if manifest is None:
        if found.classes is None:
            cli.warn(
                f"{file} does not say which classes its head has: nothing can compare them; name "
                "a packed set of the same classes in the same order with --data URL --set NAME"
            )
        return found.classes
    rows, known = len(found.state["head.weight"]), manifest.label_space
    where = files.join(arguments.data, arguments.packed)
    for warning in check_head(found.classes, rows, file, known, where):
        cli.warn(warning)
    return found.classes or known


def export_weights(arguments: Export) -> None:
    """Write a model in a format of other code.

    Raises:
        ValueError: if there is no model, the format cannot express it, its text tower is not to be
            found, or --out holds something else.
    """
    out, to = arguments.out, arguments.to
    if to in SUFFIXES and out.suffix != SUFFIXES[to]:
        raise ValueError(f"--out is {out}; a file of this format ends in {SUFFIXES[to]}")
    if arguments.text and to not in ("open-clip", "model-soups"):
        raise ValueError(f"--text is {arguments.text}, but the format {to} has no text tower")
    weights_path = checkpoint_path(arguments.source)
    state, architecture, metadata, classes = load_state(weights_path)
    digest = files.sha256_file(weights_path)
    require_own_weights(arguments.source, sha256=digest)
    if reached := unfinished(arguments.source):
        cli.warn(f"{arguments.source} has not finished training ({reached}); its card says so")
    config = records.find_config(arguments.source)
    if to in ("released", "model-soups"):
        load.require_openai_tower(architecture, f"the format {to}")
    clip = None
    if to in ("open-clip", "model-soups"):
        clip = text_tower(arguments.text, architecture, config)
        require_same_tower(clip.architecture, architecture)
    source = card.Source(path=str(arguments.source), sha256=digest, text=arguments.text)
    card_path = out / weights.CARD if to == "open-clip" else out.with_name(f"{out.name}.json")
    _require_same_export(out, card_path, to, source)
    metrics = metrics_of(arguments.source)
    known = classes or classes_of_run(arguments.source, config)
    if to == "open-clip":
        assert clip is not None
        contents = hub_folder(state, architecture, clip)
    else:
        contents = {out.name: file_content(to, state, weights_path, metrics, clip)}
    folder = out if to == "open-clip" else out.parent
    rows, features = state["head.weight"].shape
    described = card.Card(
        format=to,
        source=source,
        files={name: files.sha256_bytes(data) for name, data in contents.items()},
        architecture=architecture,
        activation="QuickGELU" if architecture.quick_gelu else "GELU",
        preprocessing=card.Preprocessing(
            size=architecture.image_size, mean=architecture.mean, std=architecture.std
        ),
        head=card.Head(classes=rows, features=features),
        classes=known.names if known else None,
        class_ids=known.ids if known else None,
        prompts_sha256=known.prompts_sha256 if known else None,
        trained_on=tuple(sorted(trained_on.of_model(arguments.source, metadata))),
        recipe=config.recipe if config else metadata.get("recipe"),
        seed=config.seed if config else None,
        unfinished=reached,
        metrics=metrics,
        provenance=files.provenance(),
    )
    # first, so that the same command can resume where it was stopped
    files.write_json(str(card_path), described.to_json())
    for name, data in contents.items():
        files.write_bytes(str(folder / name), data)
    cli.say(f"exported: {out}, described in {card_path}")


def text_tower(text: str, architecture: Architecture, config: RunConfig | None) -> PretrainedClip:
    """Return the CLIP that a model was made from, for its text tower.

    Args:
        text: what --text says; empty looks at the run.
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


def require_named(clip: str, option: str, *named: str) -> None:
    """Check that the model hub is asked only for models that the command line names.

    Weights and run folders may be a stranger's, who would learn who reads them.

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
    if config is None:
        return
    if config.model.pretrained:
        yield ModelConfig(clip=architecture.clip, pretrained=config.model.pretrained)
    source = config.imported_from
    if source and source.text and source.path:
        yield _text_of(Path(source.path), architecture)
    for ancestor in config.merged_from or ():
        path = Path(ancestor.path).resolve()
        if path not in seen and len(seen) < ANCESTORS:
            seen.add(path)
            yield from _origins(records.find_config(path), architecture, seen)


def require_same_tower(original: Architecture, ours: Architecture) -> None:
    """Check that the text tower comes with the image tower that was fine-tuned.

    Raises:
        ValueError: with the differences.
    """
    if changed := ours.difference(original):
        raise ValueError(
            f"the text tower belongs to another model: {'; '.join(changed)}; name the right one "
            "with --text"
        )


def classes_of_run(run: Path, config: RunConfig | None) -> Classes | None:
    """Return the classes of the set a run was trained on; None, with a warning, if unknown.

    For weights that were written before they carried their classes. The set counts only if it is
    still the one of the training, by its hash.
    """
    why = "the run does not say on which data it was trained"
    training = records.find_training(run)
    if config and config.data and config.train_set and training:
        try:
            manifest = Manifest.load(files.join(config.data, config.train_set))
            if manifest.sha256 == training.manifest_sha256:
                return manifest.label_space
            why = f"{config.train_set} was packed again since the run was trained"
        except ValueError as error:
            why = str(error)
    cli.warn(f"the card will name no classes: {why}")
    return None


def metrics_of(source: Path) -> dict[str, Any]:
    """Return the counts of the weights as they are now; if stale, none and a warning."""
    results = read_results(source)
    if results is None:
        return {}
    try:
        warnings = require_current(source, results)
    except ValueError as error:
        cli.warn(f"the card will have no accuracies: {error}")
        return {}
    for warning in warnings:
        cli.warn(warning)
    return {name: dataclasses.asdict(count) for name, count in results.sets.items()}


def hub_folder(
    state: dict[str, Tensor], architecture: Architecture, clip: PretrainedClip
) -> dict[str, bytes]:
    """Return name -> content of a folder in open_clip's hub layout; its configuration is last."""
    whole = {name: value.contiguous() for name, value in clip.model.state_dict().items()}
    whole |= {name: value for name, value in state.items() if name.startswith("visual.")}
    head = {name: value for name, value in state.items() if name.startswith("head.")}
    preprocess = {
        **open_clip.get_model_preprocess_cfg(clip.model),
        **load.RESIZE,  # whatever its weights were trained with before
        "size": architecture.image_size,
        "mean": architecture.mean,
        "std": architecture.std,
    }
    config = {
        "model_cfg": load.model_config(clip.architecture.clip),
        "preprocess_cfg": preprocess,
    }
    contents = {weights.HUB_HEAD: save(head)}
    if vocabulary := load.vocabulary_of(clip.architecture.clip):
        contents[vocabulary.name] = vocabulary.read_bytes()
    contents[weights.HUB_WEIGHTS] = save(whole)
    contents[weights.HUB_CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return contents


def file_content(
    to: Format,
    state: dict[str, Tensor],
    weights_path: Path,
    metrics: dict[str, Any],
    clip: PretrainedClip | None,
) -> bytes:
    """Return the content of the file for the formats that are one."""
    if to == "safetensors":
        return weights_path.read_bytes()
    if to == "released":
        counts = metrics.get(ID_SET)
        return weights.to_released(
            state, 100 * counts["correct"] / counts["total"] if counts else None
        )
    assert clip is not None
    named = clip.model.state_dict().items()
    return weights.to_model_soups(
        state, {name: value for name, value in named if not name.startswith("visual.")}
    )


def _require_same_export(out: Path, card_path: Path, to: Format, source: card.Source) -> None:
    """Check that what is at --out, if anything, is this very export."""
    there = any(out.iterdir()) if out.is_dir() else out.exists()
    if not there and not card_path.exists():
        return
    old = card.read(card_path)
    if old is None:
        raise ValueError(f"{out if there else card_path} is there already; choose another --out")
    before, now = _identity(old.format, old.source), _identity(to, source)
    if changed := files.difference(before, now):
        raise ValueError(f"{out} holds another export: {'; '.join(changed)}; choose another --out")


def _identity(to: Format, source: card.Source) -> dict[str, Any]:
    return {"format": to, "source": dataclasses.asdict(source)}
