"""`python -m rft.convert export`: a model in a format of other code, with a card."""

import dataclasses
import io
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import open_clip
import torch
import tyro
from safetensors.torch import save
from torch import Tensor

import rft
from rft import cli
from rft.classes import Classes
from rft.clip import card, load, weights
from rft.clip.architecture import Architecture
from rft.clip.card import Format
from rft.clip.classifier import Saved, load_state
from rft.clip.load import PretrainedClip
from rft.config import settings
from rft.convert import model_card, onnx_model, push, text_tower
from rft.runs import filenames, predictions, records, trained_on
from rft.runs.folder import (
    checkpoint_path,
    read_results,
    require_current,
    require_own_weights,
    unfinished,
)
from rft.runs.records import Results, RunConfig, SetCount
from rft.sets import ID_SET
from rft.shards.manifest import Manifest
from rft.statistics.accuracy import mean_of_groups, per_group, wilson
from rft.storage import files

SUFFIXES = {"onnx": ".onnx", "released": ".pt", "model-soups": ".pt", "safetensors": ".safetensors"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export:
    """Write a model in a format of other code, and a card (JSON) that says what it is.

    open-clip: a folder that open_clip.create_model_and_transforms("local-dir:PATH") loads, with the
    fine-tuned image tower and the original text tower; the classification head lies beside, in
    head.safetensors, and so do load.py, which classifies with open_clip alone, and a page about the
    model (README.md).

    onnx: a file (.onnx) of image tower and head: RGB images as bytes (N, 3, size, size), resized
    and cropped, give logits. It needs `pip install 'rft-clip[onnx]'`.

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
    push: str = ""
    """Repository of the model hub to upload the folder to, hf://USER/NAME (open-clip). The login is
    huggingface_hub's own: `hf auth login`, or HF_TOKEN in the environment."""
    private: bool = False
    """Whether only its owner sees a repository that --push makes."""


class Model(NamedTuple):
    """What is exported, and what its run records of it."""

    path: Path
    sha256: str
    saved: Saved
    config: RunConfig | None
    unfinished: str
    metrics: dict[str, Any]
    temperature: float | None
    classes: Classes | None


def export_weights(arguments: Export) -> None:
    """Write a model in a format of other code.

    Raises:
        ValueError: if there is no model, the format cannot express it, its text tower is not to be
            found, --out holds something else, or the model hub does not take what is pushed.
    """
    out, to = arguments.out, arguments.to
    repo = _check(arguments)
    path = checkpoint_path(arguments.source)
    saved, digest = load_state(path), files.sha256_file(path)
    # configuration and results of the folder go into the card: they must be of these weights
    require_own_weights(arguments.source, sha256=digest)
    if reached := unfinished(arguments.source):
        log.warning(f"{arguments.source} has not finished training ({reached}); its card says so")
    config = records.find_config(arguments.source)
    clip = _text_tower(arguments, saved.architecture, config)
    source = card.Source(path=str(arguments.source), sha256=digest, text=arguments.text)
    card_path = out / weights.CARD if to == "open-clip" else out.with_name(f"{out.name}.json")
    # before the tensors are copied into the format's bytes, which may be gigabytes
    old = _require_same_export(out, card_path, to, source)
    results = _results_of(arguments.source)
    sets = results.sets if results else {}
    metrics = {name: _numbers(arguments.source, name, count) for name, count in sets.items()}
    classes = saved.classes or _classes_of_run(arguments.source, config)
    temperature = _temperature_of(results)
    model = Model(path, digest, saved, config, reached, metrics, temperature, classes)
    contents = _contents(arguments, model, clip)
    described = _describe(arguments, model, source, contents)
    folder = out if to == "open-clip" else out.parent
    if to == "open-clip":
        described = _with_page(described, folder, old, contents)
    # first, so that the same command can resume where it was stopped
    files.write_json(
        str(card_path),
        dataclasses.asdict(described)
        | {"trained_on": trained_on.as_lists(described.trained_on or ())},
    )
    for name, data in contents.items():
        files.write_bytes(str(folder / name), data)
    cli.say(f"exported: {out}, described in {card_path}")
    if repo:
        names = {weights.CARD, model_card.NAME, *described.files}
        cli.say(f"pushed: {push.push(folder, names, repo, private=arguments.private)}")


def _check(arguments: Export) -> str:
    """Check options against each other; return the repository to push to, or an empty text."""
    out, to = arguments.out, arguments.to
    if to in SUFFIXES and out.suffix != SUFFIXES[to]:
        raise ValueError(f"--out is {out}; a file of this format ends in {SUFFIXES[to]}")
    if arguments.text and to not in ("open-clip", "model-soups"):
        raise ValueError(f"--text is {arguments.text}, but the format {to} has no text tower")
    if to == "onnx":
        onnx_model.require_packages()
    if not arguments.push:
        if arguments.private:
            raise ValueError("--private is of a repository that is made: add --push hf://USER/NAME")
        return ""
    if to != "open-clip":
        raise ValueError(f"--push takes the folder of --to open-clip, not {to}")
    repo = push.repository(arguments.push)
    push.require_login(repo)
    return repo


def _text_tower(
    arguments: Export, architecture: Architecture, config: RunConfig | None
) -> PretrainedClip | None:
    """Return the CLIP whose text tower goes into the format; None if it has none."""
    if arguments.to in ("released", "model-soups"):
        load.require_openai_tower(architecture, f"the format {arguments.to}")
    if arguments.to not in ("open-clip", "model-soups"):
        return None
    text_tower.require_untrained(config)
    clip = text_tower.find(arguments.text, architecture, config)
    if changed := architecture.difference(clip.architecture):
        raise ValueError(
            f"the text tower belongs to another model: {'; '.join(changed)}; name the right "
            "one with --text"
        )
    return clip


def _contents(arguments: Export, model: Model, clip: PretrainedClip | None) -> dict[str, bytes]:
    """Return name -> content of the files of an export."""
    state, architecture, to = model.saved.state, model.saved.architecture, arguments.to
    if to == "open-clip":
        assert clip is not None
        return _hub_folder(state, architecture, clip)
    name = arguments.out.name
    if to != "onnx":
        return {name: _file_content(to, state, model.path, model.metrics, clip)}
    entries = {
        "classes": model.classes.names if model.classes else None,
        "temperature": model.temperature,
        "source_sha256": model.sha256,
        "rft": rft.__version__,
    }
    return {name: onnx_model.to_bytes(state, architecture, entries)}


def _describe(
    arguments: Export, model: Model, source: card.Source, contents: dict[str, bytes]
) -> card.Card:
    (state, architecture, metadata, _), config = model.saved, model.config
    rows, features = state["head.weight"].shape
    known = model.classes
    return card.Card(
        format=arguments.to,
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
        base_model=text_tower.base_model(arguments.text, architecture, config),
        temperature=model.temperature,
        settings=settings(config.whole) if config else {},
        # a set has no order of its own
        trained_on=tuple(sorted(trained_on.of_model(arguments.source, metadata))),
        recipe=config.recipe if config else metadata.get("recipe"),
        seed=config.seed if config else None,
        unfinished=model.unfinished,
        metrics=model.metrics,
        provenance=files.provenance(),
    )


def _with_page(
    described: card.Card, folder: Path, old: card.Card | None, contents: dict[str, bytes]
) -> card.Card:
    """Add the page to an export, unless the one that exists was edited; return the whole card."""
    path = folder / model_card.NAME
    written = old.files.get(path.name) if old else None
    if path.exists() and files.sha256_file(path) != written:
        # without a hash in the card, so that it stays next time as well
        log.info(f"{path} was edited and stays; remove it to have it written again")
        return described
    page, config = model_card.page(described), contents.pop(weights.HUB_CONFIG)
    contents.update({path.name: page, weights.HUB_CONFIG: config})  # which is last
    hashes = {**described.files, path.name: files.sha256_bytes(page)}
    return dataclasses.replace(described, files=hashes)


def _classes_of_run(run: Path, config: RunConfig | None) -> Classes | None:
    """Return the classes of the set a run was trained on; None, with a warning, if unknown.

    For weights that were written before they carried their classes. The set counts only if it is
    still the one of the training, by its hash.
    """
    why = "the run does not say on which data it was trained"
    training = records.find(run / filenames.TRAINING, records.Training)
    if config and config.data and config.train_set and training:
        try:
            manifest = Manifest.load(files.join(config.data, config.train_set))
            if manifest.sha256 == training.manifest_sha256:
                return manifest.label_space
            why = f"{config.train_set} was packed again since the run was trained"
        except ValueError as error:  # its data may be gone; they are needed for names alone
            why = str(error)
    log.warning(f"the card will name no classes: {why}")
    return None


def _results_of(source: Path) -> Results | None:
    """Return the results of the weights as they are now; if stale, none and a warning."""
    results = read_results(source)
    if results is None:
        return None
    try:
        warnings = require_current(source, results)
    except ValueError as error:
        log.warning(f"the card will have no accuracies: {error}")
        return None
    for warning in warnings:
        log.warning(warning)
    return results


def _numbers(source: Path, name: str, count: SetCount) -> dict[str, Any]:
    """Return what a card has of a set's counts; predictions stay in the run folder."""
    kept = ("correct", "total", "manifest_sha256")
    found: dict[str, Any] = {field: getattr(count, field) for field in kept}
    found["interval"] = wilson(count.correct, count.total)
    if count.value is not None:
        found[count.score] = count.value
    if count.temperature is not None:
        found["temperature"] = count.temperature.value
    if count.predictions_sha256 is not None:
        path = predictions.path_of(source, name)
        try:
            rows = predictions.read(path, count.total, count.predictions_sha256)
        except ValueError as error:
            log.warning(f"the card will have no accuracy per class of {name}: {error}")
        else:
            groups = int(max(rows.label.max(), rows.prediction.max())) + 1
            found["mean_per_class"] = mean_of_groups(*per_group(rows.right, rows.label, groups))
    return found


def _temperature_of(results: Results | None) -> float | None:
    """Return the temperature that was fitted; None, with a warning, if sets have different ones."""
    try:
        found = results.temperature if results else None
    except ValueError as error:
        log.warning(f"the card will have no temperature: {error}")
        return None
    return found.value if found else None


def _hub_folder(
    state: dict[str, Tensor], architecture: Architecture, clip: PretrainedClip
) -> dict[str, bytes]:
    """Return name -> content of a folder in open_clip's hub layout; its configuration is last."""
    # safetensors refuses weights that are not contiguous
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
        "model_cfg": load.hub_config(clip.architecture.clip).model_cfg,
        "preprocess_cfg": preprocess,
    }
    contents = {weights.HUB_HEAD: save(head), model_card.LOADER: model_card.loader()}
    if vocabulary := load.vocabulary_of(clip.architecture.clip):
        contents[vocabulary.name] = vocabulary.read_bytes()
    contents[weights.HUB_WEIGHTS] = save(whole)
    # last: a folder without it is refused, by open_clip as by rft, so half an export loads nowhere
    contents[weights.HUB_CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return contents


def _file_content(
    to: Format,
    state: dict[str, Tensor],
    weights_path: Path,
    metrics: dict[str, Any],
    clip: PretrainedClip | None,
) -> bytes:
    """Return the content of the file for the formats that are one."""
    if to == "safetensors":
        # as they are: written anew, the same weights would have another hash than the run's
        return weights_path.read_bytes()
    if to == "released":  # what that code evaluates, starts from and distils from
        counts = metrics.get(ID_SET)
        content = {
            "epoch": 0,
            "best_value": None,
            "_data_counters": [0, 0, 0, 0],
            "model": _renamed(state, {"visual.": "backbone.", "head.": "classifier."}),
            # in percent; it is printed when a teacher is loaded
            "test_acc": 100 * counts["correct"] / counts["total"] if counts else None,
        }
    else:
        assert clip is not None
        # that code keeps all of the text tower but the layers
        layers = ("visual.", "transformer.")
        rest = {
            n: value for n, value in clip.model.state_dict().items() if not n.startswith(layers)
        }
        names = {"visual.": "model.visual.", "head.": "classification_head."}
        content = {**_renamed(rest, {"": "model."}), **_renamed(state, names)}
    # in memory first: the card, which is written before, holds the hash of these bytes
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def _renamed(state: dict[str, Tensor], prefixes: dict[str, str]) -> dict[str, Tensor]:
    return {
        f"{theirs}{name.removeprefix(ours)}": value
        for name, value in state.items()
        for ours, theirs in prefixes.items()
        if name.startswith(ours)
    }


def _require_same_export(
    out: Path, card_path: Path, to: Format, source: card.Source
) -> card.Card | None:
    """Check that what is at --out, if anything, is this very export; return its card."""
    there = any(out.iterdir()) if out.is_dir() else out.exists()
    if not there and not card_path.exists():
        return None
    old = card.read(card_path)
    if old is None:
        raise ValueError(f"{out if there else card_path} is there already; choose another --out")
    before, now = (
        {"format": kind, "source": dataclasses.asdict(origin)}
        for kind, origin in ((old.format, old.source), (to, source))
    )
    if changed := files.difference(before, now):
        raise ValueError(f"{out} holds another export: {'; '.join(changed)}; choose another --out")
    return old
