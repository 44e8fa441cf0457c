"""The stages of `rft photos` as data: documented commands in order. Pure functions.

The layout of OUT: `shards/` the packed photos, `runs/` the models, `choice.json` the choice among
them, `report/` the report, `model/` the export.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rft import recipes
from rft.clip.load import MINIATURE
from rft.clip.weights import CARD
from rft.config import Device
from rft.photos.rates import Rates
from rft.predict.model import EXPORT
from rft.runs import filenames
from rft.shards.folder import MANIFEST
from rft.storage.documents import Epochs, Seed
from rft.train.rate import about

ZERO_SHOT, VANILLA, OURS = "zero-shot", "vanilla", recipes.DEFAULT
# the order resolves ties, after the kind of model (rft.merge.choose)
TRAINED = (ZERO_SHOT, OURS, VANILLA)
ALPHA = 0.5  # of both WiSE averages; nothing known about a new set suggests a different value
FAMILIES = {OURS: f"wise-{OURS}", VANILLA: "wise-ft"}
# Without held-out images no measurement can choose. The average of the pre-trained model and ours
# keeps knowledge of both, and is ahead of both out of distribution in the paper.
WITHOUT_HELD_OUT = OURS
CANDIDATES = len(TRAINED) + len(FAMILIES)
# pixels need no decoding: starting loader processes would take longer than reading
WORKERS = "0"
TRAIN_SET, TEST_SET = "train", "test"


@dataclass(frozen=True, kw_only=True)
class Task:
    """The input and settings of all stages."""

    source: Path
    out: Path
    clip: str
    pretrained: str
    image_size: int
    classes: str | None
    test_share: float
    split_seed: Seed
    ignore: tuple[str, ...]
    max_bad: int
    epochs: Epochs | None
    seed: Seed
    device: Device

    @property
    def data(self) -> Path:
        """The data root."""
        return self.out / "shards"

    @property
    def choice(self) -> Path:
        """The document that names the chosen model."""
        return self.out / "choice.json"

    @property
    def report(self) -> Path:
        """Folder of the report."""
        return self.out / "report"

    @property
    def model(self) -> Path:
        """Folder of the export."""
        return self.out / EXPORT

    def run(self, name: str) -> Path:
        """Return the run folder of a recipe or average."""
        return self.out / "runs" / name

    def wise(self, recipe: str) -> Path:
        """Return the run folder of the average of the pre-trained model and a fine-tuned one."""
        return self.run(f"{FAMILIES[recipe]}-{ALPHA:g}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command of the plan, as the words after `python`."""

    name: str
    words: tuple[str, ...]


def pack(task: Task) -> Stage:
    """Build the command that packs the photos, as the square that the model sees."""
    words = ["tools/shard_folder.py", "--source", str(task.source), "--out", str(task.data)]
    words += ["--encoding", "pixels", "--size", str(task.image_size)]
    if task.classes:
        words += ["--classes", task.classes]
    words += ["--test-share", f"{task.test_share:g}", "--split-seed", str(task.split_seed)]
    if task.ignore:
        words += ["--ignore", *task.ignore]
    if task.max_bad:
        words += ["--max-bad", str(task.max_bad)]
    return Stage(name="pack", words=tuple(words))


def train(task: Task, recipe: str) -> Stage:
    """Build the command that trains a recipe."""
    words = ["-m", "rft.train", recipe, "--data", str(task.data), "--train-set", TRAIN_SET]
    words += ["--scale", "small", "--run-dir", str(task.run(recipe)), "--seed", str(task.seed)]
    words += ["--model.clip", task.clip, "--device", task.device, "--loader.workers", WORKERS]
    if task.pretrained:
        words += ["--model.pretrained", task.pretrained]
    if recipe != ZERO_SHOT:
        words += numbers(task, recipe)
    return Stage(name=f"train {recipe}", words=tuple(words))


def numbers(task: Task, recipe: str) -> list[str]:
    """List the options for hyperparameters that differ from the paper's."""
    words = [] if task.epochs is None else ["--optim.epochs", str(task.epochs)]
    if task.clip == MINIATURE:
        # tuned for the tiny CLIP, which would hardly change with the paper's values
        tiny = recipes.build(recipe, scale="miniature")
        words += ["--optim.lr", f"{tiny.optim.lr:g}"]
        if tiny.method.distill_weight:
            words += ["--method.distill-weight", f"{tiny.method.distill_weight:g}"]
    return words


def averages(task: Task) -> list[str]:
    """List the options that make both WiSE averages in memory."""
    words = []
    for recipe in FAMILIES:
        words += ["--wise", str(task.run(ZERO_SHOT)), str(task.run(recipe)), f"{ALPHA:g}"]
    return [*words, "--out", str(task.out / "runs")]


def choose(task: Task) -> Stage:
    """Build the command that chooses by held-out images."""
    runs = [str(task.run(recipe)) for recipe in TRAINED]
    words = ["-m", "rft.merge.choose", *runs, "--data", str(task.data), *averages(task)]
    words += ["--save", str(task.choice), "--device", task.device, "--workers", WORKERS]
    return Stage(name="choose", words=tuple(words))


def evaluate(task: Task, *, held_out: bool) -> Stage:
    """Build the command that evaluates all candidates on the test part."""
    runs = [str(task.run(recipe)) for recipe in TRAINED]
    words = ["-m", "rft.evaluate", *runs, "--data", str(task.data), *averages(task)]
    words += ["--sets", TEST_SET, "--device", task.device, "--workers", WORKERS]
    if held_out:
        words += ["--temperature"]
    return Stage(name="evaluate", words=tuple(words))


def merge(task: Task, recipe: str) -> Stage:
    """Build the command that writes the weights of an average."""
    ends = [str(task.run(ZERO_SHOT)), str(task.run(recipe))]
    words = ["-m", "rft.merge", "wise", *ends, "--alpha", f"{ALPHA:g}"]
    return Stage(name="merge", words=(*words, "--out", str(task.wise(recipe))))


def report(task: Task, chosen: Path) -> Stage:
    """Build the command that reports on all candidates; `chosen` is a run or the choice."""
    words = ["-m", "rft.report", str(task.out / "runs"), "--out", str(task.report)]
    words += ["--data", str(task.data), "--chosen", str(chosen)]
    return Stage(name="report", words=tuple(words))


def export(task: Task, model: Path, out: Path) -> list[Stage]:
    """Build the commands that export a model, after writing its weights if it is an average."""
    words = ["-m", "rft.convert", "export", str(model), "--to", "open-clip", "--out", str(out)]
    merged = [merge(task, recipe) for recipe in FAMILIES if task.wise(recipe) == model]
    return [*merged, Stage(name="export", words=tuple(words))]


def end(task: Task, chosen: Path, *, held_out: bool) -> list[Stage]:
    """List the stages after the choice, which held-out images made if there are any."""
    # the report last, so that its warnings are seen
    named = task.choice if held_out else chosen
    return [*export(task, chosen, task.model), report(task, named)]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The quantities that determine the time of each stage."""

    train: int
    """Images to train on and to hold out."""
    test: int
    classes: int
    prompts: int
    """Of each class."""
    held_out: int
    steps: int
    """Optimizer steps of a training."""
    epochs: int


def seconds(sizes: Sizes, rates: Rates) -> dict[str, float]:
    """Estimate the time of each stage, in seconds."""
    # every training loads the CLIP, embeds the prompts and, per epoch, predicts the held-out images
    start = rates.load + sizes.classes * sizes.prompts * rates.prompt
    selection = sizes.epochs * sizes.held_out * rates.forward
    found = {
        "pack": (sizes.train + sizes.test) * rates.pack,
        f"train {ZERO_SHOT}": start + sizes.held_out * rates.forward,
    }
    for recipe in FAMILIES:
        found[f"train {recipe}"] = start + sizes.steps * rates.step[recipe] + selection
    found["evaluate"] = CANDIDATES * (sizes.test + sizes.held_out) * rates.forward
    found["choose"] = CANDIDATES * sizes.held_out * rates.forward if sizes.held_out else 0.0
    found["report"] = found["export"] = 0.0  # negligible
    return found


def is_done(task: Task, stage: Stage) -> bool:
    """Whether the result of a stage exists; the stage itself checks its origin."""
    kind, _, name = stage.name.partition(" ")
    candidates = [task.run(recipe) for recipe in TRAINED] + [
        task.wise(recipe) for recipe in FAMILIES
    ]
    results = {
        "pack": [task.data / one / MANIFEST for one in (TRAIN_SET, TEST_SET)],
        "train": [task.run(name) / filenames.TRAINING],
        "evaluate": [run / filenames.RESULTS for run in candidates],
        "choose": [task.choice],
        "merge": [Path(stage.words[-1]) / filenames.PROVENANCE],
        "export": [task.model / CARD],
    }
    # the report is always made again
    return kind in results and all(path.exists() for path in results[kind])


def table(
    times: Mapping[str, float] | None, stages: Sequence[Stage], done: Collection[str] = ()
) -> list[str]:
    """Format one line for each stage, and the total of those that are not done; None: no times."""
    if times is None:
        return [f"  {one.name:32}{'done' if one.name in done else ''}".rstrip() for one in stages]
    left = {one.name: times.get(one.name, 0.0) for one in stages if one.name not in done}
    lines = [
        f"  {one.name:32}{about(left[one.name]) if one.name in left else 'done'}" for one in stages
    ]
    return [*lines, f"  {'all':32}{about(sum(left.values()))}"]
