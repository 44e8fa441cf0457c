"""The documents of a run folder as types, and the only functions that read them.

A run folder may come from an older rft, or from an untrusted source. A malformed file is an error
that names it. After reading, values have the types below and are not checked a second time. Fields
that earlier versions did not write have defaults. `rft.runs.folder` checks which documents belong
together, such as weights and counts. No torch: the report uses this too.
"""

import dataclasses
import math
import posixpath
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

from rft.runs.filenames import CONFIG
from rft.sets import Score
from rft.storage import documents, files, local
from rft.storage.documents import FOREIGN, Count, Name, Schema, Sha256, Share, Text, document

T = TypeVar("T")

# field of a config.json -> kind of derived folder; a training has `optim` instead
ORIGINS = {"merged_from": "merge", "imported_from": "import", "ensemble_of": "ensemble"}

RECORD_BYTES = 2**24  # limit of a document; a training's has a few thousand
LARGEST_LOSS = 1e100  # above float32's largest, 3e38, and small enough for the axes of a plot
SAME_TEMPERATURE = 1e-3  # relative difference of two fits on the same images
LINE_BYTES = 2**16  # limit of a line of metrics, which has a few hundred


def _recipe(text: str) -> str:
    # a name of spaces alone is printable, but invisible in a table
    if not text.strip():
        raise ValueError("must be a printable name")
    return text


def _set_name(name: str) -> str:
    # the name is joined to a data root and must stay below it
    if posixpath.normpath(name) != name or name.split("/")[0] in ("", ".", "..") or "://" in name:
        raise ValueError("must be the name of a packed set, such as imagenet-val")
    return name


def _drawable(value: float) -> float:
    if math.isfinite(value) and abs(value) > LARGEST_LOSS:
        raise ValueError(f"must be from {-LARGEST_LOSS:g} to {LARGEST_LOSS:g}, infinite or NaN")
    return value


def _no_empty(value: object) -> object:
    return None if value == "" else value


Recipe = Annotated[Name, AfterValidator(_recipe)]
"""Name of a row in the report."""
SetName = Annotated[Name, AfterValidator(_set_name)]
"""Folder of a packed set below its data root."""
Step = Annotated[int, Field(ge=-1, le=2**53)]
"""An optimizer step, -1 if none was selected."""
RecordedSeed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""Seed of a run; older versions accepted seeds that `Config` refuses now."""
Number = Annotated[float, Field(allow_inf_nan=True)]
"""A measured number; a diverged run logs NaN."""
Loss = Annotated[Number, AfterValidator(_drawable)]
"""A term of the loss, which the report draws."""
Hashes = dict[Name, Sha256]
"""File or input -> hash."""


@document(name="temperature")
class Temperature:
    """The divisor of a model's logits that makes its confidences match its accuracy."""

    value: Annotated[float, Field(gt=0)]
    images: Annotated[int, Field(gt=0, le=2**53)]
    """Number of images that it was fitted on: held-out images of a training set."""
    train_set: SetName
    manifest_sha256: Sha256
    held_out: Count
    split_seed: RecordedSeed


@document(name="count")
class SetCount:
    """The correct predictions on one packed set, and its files and scores."""

    correct: Count
    total: Annotated[int, Field(gt=0, le=2**53)]
    manifest_sha256: Sha256
    predictions_sha256: Sha256 | None = None
    """Hash of the set's file of predictions (`rft.runs.predictions`); older counts have none."""
    logits_sha256: Sha256 | None = None
    """Hash of the set's file of logits, if --logits kept one."""
    temperature: Temperature | None = None
    """Temperature of the scaled columns of the predictions, if one was fitted."""
    no_temperature: Text = ""
    """Why no temperature was fitted although --temperature was given."""
    seen: Count | None = 0
    """Images of the set that the model was trained on; None if its training set was not available.
    Older versions wrote 0 then."""
    seen_other_label: Count = 0
    """Of these, the images that its training sets have only under other labels."""
    score: Score = "top1"
    """The set's own score, as its manifest declares it."""
    ood: bool = False
    """Whether the set counts in the OOD average."""
    value: Share | None = None
    """The value of `score`, unless that is top-1."""
    worst_domain: Text = ""
    """The domain with that value, if `score` is of the worst domain."""

    def __post_init__(self) -> None:
        if self.correct > self.total:
            raise ValueError(f"{self.correct} are correct of {self.total}; it must not be more")
        if self.seen_other_label > (self.seen or 0):
            raise ValueError(f"seen_other_label is {self.seen_other_label}, seen is {self.seen}")
        if (self.value is None) != (self.score == "top1"):
            raise ValueError(f"value is {self.value}, and score is {self.score!r}")


@document(name="results")
class Results:
    """A results.json: counts, and the weights that they belong to."""

    schema: Schema = 1
    step: Count
    checkpoint: Text = ""
    checkpoint_sha256: Sha256
    config_sha256: Annotated[Sha256 | None, BeforeValidator(_no_empty)] = None
    """Hash of the run folder's config.json; None for a weights file."""
    sets: dict[SetName, SetCount]
    """Packed set -> counts."""
    unfinished: Text = ""
    """Progress of the training, if it had not ended."""
    without_weights: bool = False
    """Whether the weights were averaged in memory and not written; config.json names the models."""
    provenance: dict[Name, Any] = dataclasses.field(default_factory=dict)

    @property
    def temperature(self) -> Temperature | None:
        """The model's fitted temperature; None if none was fitted.

        It was fitted on held-out training images, so every set has the same one.

        Raises:
            ValueError: if the sets were evaluated at different temperatures.
        """
        found = [one.temperature for one in self.sets.values() if one.temperature is not None]
        for one in found[1:]:
            # a refit on a different device differs in the last digits
            close = math.isclose(one.value, found[0].value, rel_tol=SAME_TEMPERATURE)
            if not close or dataclasses.replace(one, value=found[0].value) != found[0]:
                raise ValueError(
                    f"its sets were evaluated at different temperatures ({found[0].value:g} and "
                    f"{one.value:g}); evaluate all of them again with --temperature"
                )
        return found[0] if found else None


@document(name="training")
class Training:
    """A training.json, the last file of a complete training."""

    steps: Count
    best_step: Step
    world_size: Count
    manifest_sha256: Sha256 | None = None
    """Hash of the training set's manifest."""
    inputs: Hashes = dataclasses.field(default_factory=dict)
    """Hashes of the weights of other runs that this one builds on."""
    weights_sha256: Hashes | None = None
    """Hashes of the files in checkpoints/."""


@document(name="progress")
class Reached:
    """A progress.json: the progress of a training."""

    step: Count
    of: Count
    checkpoint: Text = ""
    sha256: Sha256 | None = None

    def __post_init__(self) -> None:
        if self.step > self.of:
            raise ValueError(f"step is {self.step} of {self.of}; it must not be more")


@document(name="provenance", config=FOREIGN)
class Provenance:
    """A provenance.json, as `files.provenance` makes it; empty fields were not recorded."""

    rft: Text = ""
    git: Text | None = None
    packages: dict[Name, Text] = dataclasses.field(default_factory=dict)
    python: Text = ""
    machine: Text = ""
    command: tuple[Text, ...] = ()
    weights_sha256: Hashes | None = None
    """Hashes of a merge's or import's files in checkpoints/."""


@document(name="merged_from")
class Ancestor:
    """A model that a merge averaged, or a member of an ensemble."""

    path: Text
    sha256: Sha256


@document(name="soup.steps")
class Tried:
    """A model that a greedy soup tried."""

    path: Text
    sha256: Sha256
    correct: Count
    soup_correct: Count
    kept: bool


@document(name="soup")
class Soup:
    """The steps of a greedy soup."""

    correct: Count
    total: Count
    steps: tuple[Tried, ...]


@document(name="fitted.bank")
class Bank:
    """The training images that VRF measures distances to."""

    images: Annotated[int, Field(gt=0, le=2**53)]
    """Images that the zero-shot model gets wrong and the fine-tuned one right."""
    of: Annotated[int, Field(gt=0, le=2**53)]
    """Training images that were searched for them."""
    k: Annotated[int, Field(gt=0, le=2**53)]
    """Distances are to the k-th nearest image."""


@document(name="fitted")
class Fitted:
    """The fit of an ensemble to training images; no test image is used."""

    zero_shot: Temperature | None = None
    """Temperature of the zero-shot model, on held-out images."""
    fine_tuned: Temperature | None = None
    """Temperature of the fine-tuned model, on held-out images."""
    bank: Bank | None = None


@document(name="cluster")
class Cluster:
    """Test images that DaWin predicts with one merged model."""

    share: Share
    """Share of the fine-tuned weights in the merge."""
    images: Annotated[int, Field(gt=0, le=2**53)]


@document(name="clusters")
class Clusters:
    """A clusters.json: the clusters of DaWin on each test set."""

    schema: Schema = 1
    sets: dict[SetName, tuple[Cluster, ...]]


@document(name="imported_from")
class Source:
    """The source of an import."""

    format: Text
    path: Text = ""
    sha256: dict[Text, Sha256] = dataclasses.field(default_factory=dict)
    text: bool = False
    """Whether it has a text tower."""
    tag: Text = ""
    manifest_sha256: Sha256 | None = None
    """Hash of the manifest of the packed set whose class names made the head."""


@document(name="model", config=FOREIGN)
class Model:
    """The CLIP that a model was made from."""

    clip: Text = ""
    pretrained: Text = ""


@document(name="optim", config=FOREIGN)
class Optim:
    """How a run was trained."""

    epochs: Count | None = None


@document(name="loader", config=FOREIGN)
class Loader:
    """The training images of a run."""

    held_out: Count | None = None


@document(name="config", config=FOREIGN)
class RunConfig:
    """A config.json of any kind: of a training, also by an older rft, or of a derived model.

    The fields are those that commands read in other commands' folders. A training reads its own
    with `rft.config.Config`.
    """

    recipe: Recipe
    seed: RecordedSeed
    data: Text = ""
    train_set: Text = ""
    scale: Text = "paper"
    precision: Text = ""
    model: Model = dataclasses.field(default_factory=Model)
    optim: Optim | None = None
    """Only in a training."""
    loader: Loader | None = None
    """Only in a training."""
    alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    merged_from: tuple[Ancestor, ...] | None = None
    """Only in a merge."""
    soup: Soup | None = None
    """Only in a greedy soup."""
    imported_from: Source | None = None
    """Only in an import."""
    ensemble_of: tuple[Ancestor, ...] | None = None
    """Only in an ensemble: the zero-shot and the fine-tuned model."""
    fitted: Fitted | None = None
    """Only in an ensemble that was fitted to training images."""
    transductive: bool = False
    """Whether its prediction for a test image depends on the other test images."""
    whole: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The complete document, including fields that this type does not have."""

    @property
    def is_training(self) -> bool:
        """Whether rft.train made it."""
        return self.optim is not None

    @property
    def is_derived(self) -> bool:
        """Whether it belongs to a merge, an import or an ensemble."""
        return any(getattr(self, origin) is not None for origin in ORIGINS)


@document(name="metrics", config=FOREIGN)
class Metrics:
    """The values of a line of metrics.jsonl that the report shows."""

    step: Count
    time: Number | None = None
    """Seconds since 1970; lines of older versions have none."""
    ce: Loss | None = None
    mse: Loss | None = None
    kd: Loss | None = None
    # terms of particular methods, in place of ce or beside it
    contrastive: Loss | None = None
    context: Loss | None = None
    lipsum: Loss | None = None
    head: Loss | None = None
    held_out_correct: Count | None = None
    held_out_total: Annotated[int, Field(gt=0, le=2**53)] | None = None

    def __post_init__(self) -> None:
        if (self.held_out_correct is None) != (self.held_out_total is None):
            raise ValueError("held_out_correct and held_out_total must appear together")
        # here either both are None or neither is, so 0 may replace None
        if (self.held_out_correct or 0) > (self.held_out_total or 0):
            found = f"{self.held_out_correct} of {self.held_out_total}"
            raise ValueError(f"held_out_correct is {found}; it must not be more")


class Logged(NamedTuple):
    """A complete line of metrics.jsonl."""

    text: bytes
    metrics: Metrics


def find(path: Path, kind: type[T]) -> T | None:
    """Read a document of a run; None if the run does not have it.

    Raises:
        ValueError: if it is malformed, naming the file, the field and the requirement.
    """
    return files.read_document(str(path), kind, RECORD_BYTES) if path.exists() else None


def read_config(folder: Path) -> RunConfig:
    """Read the config.json of a run folder, whichever command wrote it.

    Raises:
        ValueError: if it is missing, or does not belong to a run.
    """
    path = str(folder / CONFIG)
    data = files.read_bytes(path, RECORD_BYTES)
    whole = documents.parse(data, path)
    if isinstance(whole, dict) and "recipe" not in whole:
        raise ValueError(f"{folder} is not a run folder: its {CONFIG} names no recipe")
    # `whole` overrides a field of that name in the file
    return dataclasses.replace(documents.decode(data, RunConfig, path), whole=whole)


def find_config(folder: Path) -> RunConfig | None:
    """Read a run folder's config.json; None if there is none, as beside a weights file.

    Raises:
        ValueError: if it does not belong to a run.
    """
    return read_config(folder) if (folder / CONFIG).exists() else None


def read_metrics(path: Path) -> Iterator[Logged]:
    """Yield the lines of a metrics.jsonl; an absent file has none.

    A last line without a newline was left by a killed run and is ignored.

    Raises:
        ValueError: if a complete line is not an object of numbers with a step.
    """
    if not path.exists():
        return
    with local.reader(path) as stream:
        # at most LINE_BYTES at a time, because an untrusted file may be one huge line
        lines = iter(partial(stream.readline, LINE_BYTES), b"")
        for number, text in enumerate(lines, start=1):
            where = f"{path} line {number}"
            if not text.endswith(b"\n"):
                if len(text) == LINE_BYTES:
                    raise ValueError(f"{where} has more than {LINE_BYTES} bytes")
                return
            documents.parse(text, where, nan=True)
            # resuming copies whole lines, so fields that Metrics ignores are checked as well
            documents.typed(text, dict[str, Number], where)
            yield Logged(text, documents.typed(text, Metrics, where))


def is_foreign(folder: Path) -> bool:
    """Whether a folder's config.json was written by other code: an object without a recipe."""
    if not (folder / CONFIG).is_file():
        return False
    whole = files.read_json(str(folder / CONFIG), RECORD_BYTES)
    return isinstance(whole, dict) and "recipe" not in whole
