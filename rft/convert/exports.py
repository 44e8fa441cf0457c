"""`python -m rft.convert export`: writes a model in the format of other code, with a card."""

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

SHOWN = 3  # differences in an error
SUFFIXES = {"onnx": ".onnx", "released": ".pt", "model-soups": ".pt", "safetensors": ".safetensors"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export:
    """Write a model in the format of other code, with a card (JSON) that describes it.

    open-clip: a folder for open_clip.create_model_and_transforms("local-dir:PATH"), with the
    fine-tuned image tower and the original text tower. It also has the classification head in
    head.safetensors, load.py, which classifies with open_clip alone, and a page about the model in
    README.md.

    onnx: a file (.onnx) of image tower and head. The input is RGB images as bytes (N, 3, size,
    size), resized and cropped; the output is logits. It needs the extra onnx: in rft's clone, run
    pip install '.[onnx]'.

    released: a checkpoint (.pt) of the code released with the paper.

    model-soups: a state dict (.pt) of model-soups.

    safetensors: rft's own weights file, which rft.evaluate reads too.
    """

    source: tyro.conf.Positional[Path]
    """Run folder (its selected model, or the last without held-out images) or .safetensors file."""
    to: Annotated[Format, tyro.conf.arg(name="to")]
    """Format of the export."""
    out: Path
    """Folder (open-clip) or file to write."""
    text: str = ""
    """Weights tag or file of the text tower (open-clip, model-soups), if not the run's."""
    push: str = ""
    """Upload the folder (open-clip) to hf://USER/NAME; login: `hf auth login`, or HF_TOKEN."""
    private: bool = False
    """Make a new repository of --push private."""


class Model(NamedTuple):
    """The model to export, and the records of its run."""

    path: Path
    sha256: str
    saved: Saved
    config: RunConfig | None
    unfinished: str
    metrics: dict[str, Any]
    temperature: float | None
    classes: Classes | None


def export_weights(arguments: Export) -> None:
    """Write a model in the format of other code.

    Raises:
        ValueError: if the model does not exist, the format cannot express it, its text tower is not
            found, --out holds other files, or the model hub refuses the upload.
    """
    out, to = arguments.out, arguments.to
    repo = _check(arguments)
    path = checkpoint_path(arguments.source)
    saved, digest = load_state(path), files.sha256_file(path)
    # the card describes configuration and results of the folder, which must be of these weights
    require_own_weights(arguments.source, sha256=digest)
    if reached := unfinished(arguments.source):
        log.warning(f"{arguments.source} has not finished training ({reached}); its card says so")
    config = records.find_config(arguments.source)
    clip = _text_tower(arguments, saved.architecture, config)
    source = card.Source(path=str(arguments.source), sha256=digest, text=arguments.text)
    card_path = out / weights.CARD if to == "open-clip" else out.with_name(f"{out.name}.json")
    # checked before the tensors are copied into the bytes of the format, which may be gigabytes
    old = _require_same_export(arguments, card_path, source, config)
    if old and _is_kept(out, card_path, old):
        _push(arguments, repo, old)
        return
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
    # the card is written first, so that a stopped export is recognised and the command can be rerun
    document = dataclasses.asdict(described)
    document["trained_on"] = trained_on.as_lists(described.trained_on or ())
    files.write_json(str(card_path), card.with_hash(document))
    for name, data in contents.items():
        files.write_bytes(str(folder / name), data)
    cli.say(f"exported: {out}, described in {card_path}")
    _push(arguments, repo, described)


def _push(arguments: Export, repo: str, described: card.Card) -> None:
    if repo:
        names = {weights.CARD, model_card.NAME, *described.files}
        pushed = push.push(arguments.out, names, repo, private=arguments.private)
        cli.say(f"pushed: {pushed}")


def _check(arguments: Export) -> str:
    """Check options against each other; return the repository to push to, or an empty string."""
    out, to = arguments.out, arguments.to
    if to in SUFFIXES and out.suffix != SUFFIXES[to]:
        raise ValueError(f"--out is {out}; its name must end in {SUFFIXES[to]} for --to {to}")
    if arguments.text and to not in ("open-clip", "model-soups"):
        raise ValueError(f"--text is {arguments.text}, but the format {to} has no text tower")
    if to == "onnx":
        onnx_model.require_packages()
    if not arguments.push:
        if arguments.private:
            raise ValueError("--private needs --push hf://USER/NAME")
        return ""
    if to != "open-clip":
        raise ValueError(f"--push uploads the folder of --to open-clip, not {to}")
    repo = push.repository(arguments.push)
    push.require_login(repo)
    return repo


def _text_tower(
    arguments: Export, architecture: Architecture, config: RunConfig | None
) -> PretrainedClip | None:
    """Load the CLIP whose text tower the format needs; None for formats without one."""
    if arguments.to in ("released", "model-soups"):
        load.require_openai_tower(architecture, f"the format {arguments.to}")
    if arguments.to not in ("open-clip", "model-soups"):
        return None
    text_tower.require_untrained(config)
    clip = text_tower.find(arguments.text, architecture, config)
    if changed := architecture.difference(clip.architecture):
        raise ValueError(
            f"the text tower belongs to a different model: {'; '.join(changed)}; name the right "
            "one with --text"
        )
    return clip


def _contents(arguments: Export, model: Model, clip: PretrainedClip | None) -> dict[str, bytes]:
    """Make the files of an export, as name -> content."""
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
        # sorted, because the order of a Python set is not reproducible
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
    """Add the page to an export, unless the existing page was edited; return the complete card."""
    path = folder / model_card.NAME
    written = old.files.get(path.name) if old else None
    if path.exists() and files.sha256_file(path) != written:
        # the card gets no hash of an edited page, so the next export keeps the page too
        log.info(f"{path} was edited and is kept; delete it to have a new one written")
        return described
    page, config = model_card.page(described), contents.pop(weights.HUB_CONFIG)
    contents.update({path.name: page, weights.HUB_CONFIG: config})  # the configuration stays last
    hashes = {**described.files, path.name: files.sha256_bytes(page)}
    return dataclasses.replace(described, files=hashes)


def _classes_of_run(run: Path, config: RunConfig | None) -> Classes | None:
    """Find the classes of the set that a run was trained on; None, with a warning, if unknown.

    Needed for weights of an older rft, which do not name their classes. The set is used only if its
    hash is still that of the training.
    """
    why = "the run does not record its training data"
    training = records.find(run / filenames.TRAINING, records.Training)
    if config and config.data and config.train_set and training:
        try:
            manifest = Manifest.load(files.join(config.data, config.train_set))
            if manifest.sha256 == training.manifest_sha256:
                return manifest.label_space
            why = f"{config.train_set} was repacked after the run was trained"
        except ValueError as error:  # the data may be gone; only their class names are needed
            why = str(error)
    log.warning(f"the card will have no class names: {why}")
    return None


def _results_of(source: Path) -> Results | None:
    """Read the results of the current weights; None, with a warning, if they are stale."""
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
    """Select the numbers of a set for the card; predictions stay in the run folder."""
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
    """Find the fitted temperature; None, with a warning, if sets have different ones."""
    try:
        found = results.temperature if results else None
    except ValueError as error:
        log.warning(f"the card will have no temperature: {error}")
        return None
    return found.value if found else None


def _hub_folder(
    state: dict[str, Tensor], architecture: Architecture, clip: PretrainedClip
) -> dict[str, bytes]:
    """Make the files of open_clip's hub layout, as name -> content; the configuration is last."""
    # safetensors refuses tensors that are not contiguous
    whole = {name: value.contiguous() for name, value in clip.model.state_dict().items()}
    whole |= {name: value for name, value in state.items() if name.startswith("visual.")}
    head = {name: value for name, value in state.items() if name.startswith("head.")}
    preprocess = {
        **open_clip.get_model_preprocess_cfg(clip.model),
        **load.RESIZE,  # overrides the resizing of the pre-training
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
    # last: open_clip and rft refuse a folder without it, so an incomplete export cannot be loaded
    contents[weights.HUB_CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return contents


def _file_content(
    to: Format,
    state: dict[str, Tensor],
    weights_path: Path,
    metrics: dict[str, Any],
    clip: PretrainedClip | None,
) -> bytes:
    """Make the content of a single-file format."""
    if to == "safetensors":
        # the original bytes: written anew, the same weights would have a different hash
        return weights_path.read_bytes()
    if to == "released":  # the released code evaluates it, starts from it and distils from it
        counts = metrics.get(ID_SET)
        content = {
            "epoch": 0,
            "best_value": None,
            "_data_counters": [0, 0, 0, 0],
            "model": _renamed(state, {"visual.": "backbone.", "head.": "classifier."}),
            # in percent; the released code prints it when it loads a teacher
            "test_acc": 100 * counts["correct"] / counts["total"] if counts else None,
        }
    else:
        assert clip is not None
        # model-soups keeps the text tower without its layers
        layers = ("visual.", "transformer.")
        rest = {
            n: value for n, value in clip.model.state_dict().items() if not n.startswith(layers)
        }
        names = {"visual.": "model.visual.", "head.": "classification_head."}
        content = {**_renamed(rest, {"": "model."}), **_renamed(state, names)}
    # in memory, because the card is written first and has the hash of these bytes
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
    arguments: Export, card_path: Path, source: card.Source, config: RunConfig | None
) -> card.Card | None:
    """Check that --out is empty or holds this same export; return the card of the latter.

    The run's path is not compared: it has several spellings, and a run may move.
    """
    out = arguments.out
    there = any(out.iterdir()) if out.is_dir() else out.exists()
    if not there and not card_path.exists():
        return None
    old = card.read(card_path)
    if old is None:
        raise ValueError(f"{out if there else card_path} already exists; choose another --out")
    before, now = (
        # the hash is shortened, because it is printed
        {"format": to, "weights": origin.sha256[:12], "text": _resolved(origin.text), **rest}
        for to, origin, rest in (
            (old.format, old.source, {"seed": old.seed, "settings": settings(old.settings)}),
            (
                arguments.to,
                source,
                {
                    "seed": config.seed if config else None,
                    "settings": settings(config.whole) if config else {},
                },
            ),
        )
    )
    if changed := files.difference(before, now):
        raise ValueError(
            f"{out} holds a different export: {'; '.join(changed[:SHOWN])}; choose another --out"
        )
    return old


def _resolved(text: str) -> str:
    """Resolve a --text that names a file or folder, so that equal ones compare equal."""
    path = Path(text.removeprefix(load.LOCAL))
    return str(path.resolve()) if text and path.exists() else text


def _is_kept(out: Path, card_path: Path, old: card.Card) -> bool:
    """Whether the card of an export was edited, so that the export is kept; announces it.

    Raises:
        ValueError: if a file of such an export is missing.
    """
    if not card.is_edited(card_path):
        return False
    for path in (card_path.parent / name for name in old.files):
        if not path.exists():
            raise ValueError(f"{card_path} was edited, but {path} is missing; choose another --out")
    page = card_path.with_name(model_card.NAME)
    if old.format == "open-clip" and page.is_file() and not model_card.has_classes(page, old):
        log.warning(f"{page} lists other classes than {card_path.name}; edit its list as well")
    log.info(f"{card_path} was edited, so this export is kept; choose another --out for a new one")
    return True
