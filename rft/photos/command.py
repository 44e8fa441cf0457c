"""`rft photos FOLDER --out OUT`: from photos to a report and a model in one command."""

import contextlib
import itertools
import logging
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import tyro

from rft import cli, recipes, small, stages
from rft.clip.hub import UnreachableError
from rft.clip.load import MINIATURE, download, find_tag, hub_config, names_folder
from rft.config import Config, Device, ModelConfig
from rft.loading.dataset import PackedDataset
from rft.packing.commands import folder
from rft.packing.names import Patterns, patterns_of, taken_for_name
from rft.packing.own_folder import Photos, UnusableError, read_folder
from rft.packing.shard import unreadable
from rft.packing.source import Item, require_apart
from rft.photos import plan, rates, record
from rft.photos.example import write_example
from rft.photos.plan import ZERO_SHOT, Stage, Task
from rft.runs import choice
from rft.shards.folder import MANIFEST
from rft.shards.images import encoding_parameters
from rft.shards.label_space import LabelSpace
from rft.storage.documents import Epochs, Part, Seed, Whole, document
from rft.text import plain, printable
from rft.train.rate import about

# modules that the stages load by name, imported once before they are forked
MODULES = (
    "rft.packing.commands.folder",
    "rft.train.command",
    "rft.train.finish",
    "rft.merge.command",
    "rft.merge.choose",
    "rft.evaluate.command",
    "rft.report.command",
    "rft.convert.command",
)
GLUE = "\0"  # cannot occur in a folder's name
LISTED = 30  # classes whose counts are printed
YOURS = "NEW_PHOTOS"
UNBALANCED = 20  # times as many photos in the largest class as in the smallest: printed as a note
BY_DEFAULT = "exported by default (no held-out photos to choose by)"
FEW = 5  # photos of a class to train on; fewer are printed as a note

log = logging.getLogger(__name__)


@document(name="--")
class Arguments:
    """Fine-tune CLIP on your own photos, a folder for each class, and export the best model.

    Packs the photos, trains zero-shot (nothing), vanilla and object-mask-single-fill, averages both
    with the pre-trained model (WiSE-FT), chooses among the five by images held out of training,
    evaluates them on a test part that no training sees, writes a report, and exports the chosen one
    for open_clip. The photos are only read. Rerunning the command does only the missing stages.
    Every stage is a printed command that can also be run by hand.

    Example:
    rft photos holiday --out holiday-rft
    """

    folder: Annotated[
        tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")
    ] = None
    """Folder that holds the class folders, or train/ and test/ with these in them."""
    out: Path = Path("rft-photos")
    """Output folder."""
    clip: Annotated[str, tyro.conf.arg(name="model.clip")] = ModelConfig.clip
    """The CLIP: an open_clip model name, or local-dir:PATH for a folder in open_clip's layout."""
    pretrained: Annotated[str, tyro.conf.arg(name="model.pretrained")] = ModelConfig.pretrained
    """Its open_clip weights tag, or a weights file."""
    classes: str | None = None
    """JSON file that describes the class folders: {"ids": [folder names], "names": [words for the
    text encoder], "templates": ["a photo of a {c}.", ...]}; None uses the folder names."""
    epochs: Epochs | None = None
    """Epochs of each training; None is the recipes' ten."""
    seed: Seed = 0
    """Training seed."""
    test_share: Part = 0.2
    """Share of each class that becomes the test part, if the folder has none."""
    split_seed: Seed = 0
    """Seed of the choice of the test part."""
    ignore: Annotated[Patterns, tyro.conf.arg(metavar="NAME...")] = ()
    """Names of files and folders to skip, such as '*.heic' '*.mov', in upper or lower case."""
    max_bad: Whole = 0
    """How many photos may be left out because they cannot be decoded."""
    device: Device = "auto"
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a summary of the photos and the stages with estimated times, without running them.
    The times need CLIP's weights, which are downloaded if they are missing."""
    example: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Try the command without photos and without a download: draws 304 photos of the miniature
    world into OUT/photos and uses the tiny CLIP that comes with rft."""


class Packed(NamedTuple):
    """The content of the packed sets."""

    labels: dict[str, np.ndarray]
    """Of each set."""
    left_out: int

    @property
    def size(self) -> small.Size:
        """Size of the training set."""
        return small.Size.of(self.labels[plan.TRAIN_SET])


def main() -> None:
    """Parse, draw the example's photos, plan and run."""
    arguments = cli.parse(Arguments, prog="rft.photos")
    _require_folder(arguments.out)
    if arguments.example and arguments.dry_run:  # writes nothing to OUT
        with tempfile.TemporaryDirectory() as folder:
            _plan_and_run(_with_photos(arguments, Path(folder)))
    else:
        _plan_and_run(_with_photos(arguments, arguments.out))


def _plan_and_run(arguments: Arguments) -> None:
    """Read the photos, print the plan, run its stages."""
    began = time.perf_counter()
    assert arguments.folder is not None
    source, out = arguments.folder, arguments.out
    require_apart([source], str(out), ("shards", "runs", "report", "model"))
    # before the photos are read, which takes a while
    task = _task(arguments)
    photos = _read(arguments, source)
    _require_usable(photos, source)
    now, packed = _compare(task, photos)
    size = packed.size if packed else _size(photos)
    configs = {name: training(task, name, size) for name in plan.FAMILIES}
    first = next(iter(configs.values()))
    print("\n".join(found(photos, source, arguments.max_bad, packed)), flush=True)
    folder.warn(photos)
    if arguments.epochs == 0:
        log.warning("--epochs 0 trains nothing: every model stays the pre-trained one")
    held_out = first.loader.held_out
    before = _before(task, held_out)
    # once for all stages, and after the checks above, which do not need these imports
    stages.load(MODULES)
    if task.clip == MINIATURE:
        # its tensors are tiny: threads would wait for each other, on a busy machine most of the
        # time
        torch.set_num_threads(1)
    known = task.choice.exists() or not held_out
    chosen = _chosen(task, held_out) if known else task.run(ZERO_SHOT)
    coming = [*before, *plan.end(task, chosen, held_out=held_out > 0)]
    done = {stage.name for stage in coming if plan.is_done(task, stage)}
    times: dict[str, float] | None = {}
    how = "all but the last are already done"
    if arguments.dry_run and (unreachable := _unreachable(first)):
        times, how = None, "without times, which need the weights"
        log.warning(unreachable, extra={"lines": unreachable.__notes__})
    elif len(done) < len(coming) - 1:  # every call makes the report
        times = plan.seconds(sizes(photos, first), _rates(task, configs, photos))
        how = "with times estimated from rates just measured on this machine"
    print(f"\nstages, {how}:")
    print("\n".join(plan.table(times, coming, done)), flush=True)
    if not held_out:
        print("\n".join(without_held_out(first, size)), flush=True)
    if arguments.dry_run:
        print("nothing was started (--dry-run)")
        return
    record.write(out, now)
    pack, *_ = before
    run(pack, lambda: _enough(task, photos))
    size = _packed_size(task)
    if held_out and not training(task, plan.OURS, size).loader.held_out:
        # only packing reveals which photos cannot be decoded
        print("\n".join(without_held_out(first, size)), flush=True)
        held_out = 0
    for stage in _before(task, held_out)[1:]:
        run(stage)
    chosen = _chosen(task, held_out)
    for stage in plan.end(task, chosen, held_out=held_out > 0):
        run(stage)
    _say_end(task, chosen, held_out, time.perf_counter() - began)


def _same_command(*more: str, label: str = "") -> str:
    """Format this command as it was typed, with further options, for pasting."""
    line = cli.next_step(["-m", "rft.photos", *sys.argv[1:], *more], label=label)
    return line if label else line.removeprefix(": ")


def _require_folder(out: Path) -> None:
    """Check that `out` can be created or written to; the check leaves nothing behind.

    Raises:
        ValueError: naming the obstacle.
    """
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"--out {out}: {there} is a file; name a folder")
    try:
        # tested by writing: permissions do not reveal read-only disks or /proc
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"--out {out}: cannot write into {there} ({error.strerror}); name a different folder"
        ) from error


def _read(arguments: Arguments, source: Path) -> Photos:
    """List the photos; if files or classes are refused, suggest the command that skips them."""
    labels = LabelSpace.load(arguments.classes) if arguments.classes else None
    try:
        return read_folder(
            source,
            labels,
            arguments.test_share,
            arguments.split_seed,
            patterns_of(arguments.ignore),
            arguments.max_bad,
        )
    except UnusableError as error:
        # files that are not images are skipped by name, damaged ones by number
        more = ["--ignore", *error.ignore] if error.ignore else []
        more += ["--max-bad", str(error.damaged)] if error.damaged else []
        error.add_note(_same_command(*more, label="without them"))
        raise


def _rates(task: Task, configs: Mapping[str, Config], photos: Photos) -> rates.Rates:
    return rates.measure(
        rates.Sample(
            configs,
            names=photos.labels.names,
            templates=photos.labels.templates,
            photos=rates.sample_of(photos.sources),
            size=task.image_size,
        )
    )


def options(task: Task, config: Config) -> dict[str, str]:
    """List the options that change the results, as they are typed."""
    return {
        "--model.clip": task.clip,
        "--model.pretrained": task.pretrained,
        "--epochs": str(config.optim.epochs),
        "--seed": str(task.seed),
        "--test-share": f"{task.test_share:g}",
        "--split-seed": str(task.split_seed),
    }


def without_held_out(config: Config, size: small.Size) -> list[str]:
    """Explain which model is exported without held-out photos, and how many would suffice."""
    lines = [
        "too few photos to hold some out of training:",
        f"  {plan.FAMILIES[plan.WITHOUT_HELD_OUT]}-{plan.ALPHA:g} is exported by default",
    ]
    # with a single photo of a class, no number of photos would suffice
    pairs = size._replace(fewest=max(size.fewest, 2))
    enough = next(
        images
        for images in itertools.count(size.images)
        if small.rule(config, pairs._replace(images=images), 1)["loader.held_out"]
    )
    each = ", with two or more of each class" if size.fewest < 2 else ""
    lines.append(f"  {enough:,} to train on would be enough{each}; you have {size.images:,}")
    return lines


def _unreachable(config: Config) -> UnreachableError | None:
    """Download missing weights; return the error if that fails."""
    try:
        download(config.model)
    except UnreachableError as error:
        return error
    return None


def _with_photos(arguments: Arguments, place: Path) -> Arguments:
    """Draw the example's photos into a folder of `place`, or check that a folder was named."""
    if not arguments.example:
        if arguments.folder is None:
            hint = taken_for_name(arguments.ignore)
            raise ValueError(
                "name the folder of your photos"
                f"{hint or '; --example tries the command without any (docs/photos.md)'}"
            )
        return arguments
    if arguments.folder is not None:
        raise ValueError(f"--example draws its own photos; leave {arguments.folder} out")
    source = place / "photos"
    write_example(source)
    return replace(
        arguments, folder=source, clip=MINIATURE, pretrained="", classes=str(source) + ".json"
    )


def _require_usable(photos: Photos, source: Path) -> None:
    if plan.TEST_SET not in {one.dataset for one in photos.sources}:
        raise ValueError(f"{source} has no test part; add one, or name a folder without splits")
    if len(photos.labels) < 2:
        raise ValueError(f"{source} has one class; a classifier needs two or more")


def found(
    photos: Photos, source: Path, max_bad: int = 0, packed: Packed | None = None
) -> list[str]:
    """Summarise the photos for printing: counts, split, and oddities of the classes."""
    # packing leaves out those that cannot be decoded
    most = "at most " if max_bad and not packed else ""
    bad = packed.left_out if packed else len(photos.damaged)
    left_out = f", {bad:,} left out" if bad else ""
    names = photos.labels.names
    labels = packed.labels if packed else _labels(photos)
    counts = [Counter(labels[name].tolist()) for name in (plan.TRAIN_SET, plan.TEST_SET)]
    train, test = (one.total() for one in counts)
    total = sum(len(one.items) for one in photos.sources)
    lines = [
        f"{printable(str(source))}: {total:,} photos of {len(names):,} classes; "
        f"{most}{train:,} to train on, {most}{test:,} to test with{left_out}"
    ]
    if len(names) <= LISTED:
        # keeps a name and its numbers on one line
        each = (
            f"{printable(name)} {counts[0][label]:,}+{counts[1][label]:,}".replace(" ", GLUE)
            for label, name in enumerate(names)
        )
        text = textwrap.fill(
            ", ".join(each),
            stages.COLUMNS,
            initial_indent="  ",
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += text.replace(GLUE, " ").splitlines()
    lines += photos.notes
    order = sorted(range(len(names)), key=lambda label: counts[0][label])
    small_one, large_one = order[0], order[-1]
    fewest, most = counts[0][small_one], counts[0][large_one]
    if most >= UNBALANCED * fewest:
        lines.append(
            f"unbalanced: {printable(names[large_one])} has {most:,} photos to train on, "
            f"{printable(names[small_one])} {fewest:,}; look at the accuracy of each class"
        )
    few = [names[label] for label in order if counts[0][label] < FEW]
    if few:
        lines.append(
            f"{len(few):,} {'classes have' if few[1:] else 'class has'} fewer than {FEW} photos to "
            f"train on{', such as' if few[1:] else ':'} {printable(few[0])}"
        )
    return lines


def _task(arguments: Arguments) -> Task:
    assert arguments.folder is not None
    # raises for a name that open_clip does not know
    vision = hub_config(arguments.clip).model_cfg["vision_cfg"]
    if not names_folder(arguments.clip):
        find_tag(arguments.clip, arguments.pretrained)
    local = arguments.clip.startswith("local-dir:") or arguments.clip == MINIATURE
    return Task(
        source=arguments.folder,
        out=arguments.out,
        clip=arguments.clip,
        pretrained="" if local else arguments.pretrained,
        image_size=int(vision["image_size"]),
        classes=arguments.classes,
        test_share=arguments.test_share,
        split_seed=arguments.split_seed,
        ignore=patterns_of(arguments.ignore),
        max_bad=arguments.max_bad,
        epochs=arguments.epochs,
        seed=arguments.seed,
        device=arguments.device,
    )


def training(task: Task, recipe: str, size: small.Size) -> Config:
    """Build the configuration that a training will use."""
    config = recipes.build(recipe, scale="small", data=str(task.data), run=str(task.run(recipe)))
    optim = config.optim if task.epochs is None else replace(config.optim, epochs=task.epochs)
    config = replace(
        config,
        seed=task.seed,
        device=task.device,
        model=ModelConfig(clip=task.clip, pretrained=task.pretrained),
        optim=optim,
    )
    return small.fit(config, size, 1)


def _size(photos: Photos) -> small.Size:
    return small.Size.of(_labels(photos)[plan.TRAIN_SET])


def _labels(photos: Photos) -> dict[str, np.ndarray]:
    """List the labels of each set, without those of photos that are known to be left out."""
    return {
        one.dataset: np.array([item.label for item in _items(photos, one.dataset)])
        for one in photos.sources
    }


def _compare(task: Task, photos: Photos) -> tuple[record.MadeFrom, Packed | None]:
    """Compare the inputs with the record of OUT's; then its packed sets are of these photos."""
    config = training(task, plan.OURS, _size(photos))
    now = record.made_from(photos, options(task, config))
    record.agree(task.out, now)
    return now, _packed(task, photos)


def _packed(task: Task, photos: Photos) -> Packed | None:
    """Read the packed sets, if all of them were packed from these photos."""
    urls = {one.dataset: task.data / one.dataset for one in photos.sources}
    # the record has just been compared with the photos
    needed = [task.out / record.NAME, *(url / MANIFEST for url in urls.values())]
    if not all(path.exists() for path in needed):
        return None
    sets = {name: PackedDataset(str(url)) for name, url in urls.items()}
    return Packed(
        {name: one.index.label for name, one in sets.items()},
        sum(one.manifest.quarantined for one in sets.values()),
    )


def _packed_size(task: Task) -> small.Size:
    return small.Size.of(PackedDataset(str(task.data / plan.TRAIN_SET)).index.label)


def _items(photos: Photos, name: str) -> Sequence[Item]:
    """List the photos of a set, without those that are known to be left out."""
    source = next(one for one in photos.sources if one.dataset == name)
    if not photos.damaged:
        return source.items
    return [item for item in source.items if source.root / item.path not in photos.damaged]


def sizes(photos: Photos, config: Config) -> plan.Sizes:
    """Collect the sizes that determine the time of each stage."""
    train = _size(photos).images
    held_out, epochs = config.loader.held_out, config.optim.epochs
    return plan.Sizes(
        train=train,
        test=len(_items(photos, plan.TEST_SET)),
        classes=len(photos.labels),
        prompts=len(photos.labels.templates),
        held_out=held_out,
        steps=epochs * ((train - held_out) // config.loader.batch_size),
        epochs=epochs,
    )


def _before(task: Task, held_out: int) -> list[Stage]:
    """List the stages up to the choice."""
    found = [plan.pack(task), *(plan.train(task, recipe) for recipe in plan.TRAINED)]
    found.append(plan.evaluate(task, held_out=held_out > 0))
    return [*found, plan.choose(task)] if held_out else found


def run(stage: Stage, enough: Callable[[], int] = int) -> None:
    """Run a stage; after its error, print how to resume.

    `enough` finds the --max-bad without which the stage would fail again, or 0.
    """
    try:
        stages.run_here(stage.name, stage.words)
    except SystemExit as stopped:
        if stopped.code == stages.MISTAKE:
            bad = enough()
            more = ["--max-bad", str(bad)] if bad else []
            label = "to resume without them" if bad else "to resume"
            print(plain(f"  {_same_command(*more, label=label)}"), file=sys.stderr, flush=True)
        raise


def _enough(task: Task, photos: Photos) -> int:
    """Count the photos that cannot be decoded if --max-bad allows fewer, else 0.

    Packing itself stops as soon as there are too many.
    """
    encoding = encoding_parameters("pixels", task.image_size, 0, photos=True)
    with contextlib.suppress(OSError, ValueError):  # photos that are no longer as they were listed
        bad = [unreadable(source, encoding) for source in photos.sources]
        # it applies to each set when packing, and to all of them before
        return sum(bad) if max(bad) > task.max_bad else 0
    return 0


def _chosen(task: Task, held_out: int) -> Path:
    """Find the run folder of the model to export."""
    if not held_out:
        return task.wise(plan.WITHOUT_HELD_OUT)
    return Path(choice.read(task.choice).chosen)


def _reason(made: choice.Choice) -> str:
    """Format why a model was chosen, which may not be the best one on the test photos."""
    correct = next(one.correct for one in made.candidates if one.path == made.chosen)
    return (
        f"{correct:,} of {made.images:,} held-out photos, the most of {len(made.candidates)} "
        "models; test photos are not used to choose"
    )


def _say_end(task: Task, chosen: Path, held_out: int, seconds: float) -> None:
    """Print the paths of the results, and commands to use the model or to export a better one."""
    print(f"\ndone in {about(seconds).removeprefix('about ')}")
    cli.say(f"{'chosen' if held_out else BY_DEFAULT}: {chosen.name}")
    cli.say(f"report: {task.report / 'index.html'}")
    cli.say(f"model:  {task.model}")
    if held_out:
        cli.say(f"choice: {_reason(choice.read(task.choice))}")
    words = ["-m", "rft.predict", task.model, YOURS, "--html", "page.html", "--cam"]
    unknown = {YOURS: "image files, or folders that hold some"}
    cli.say_next(cli.next_step(words, unknown=unknown))
    if found := better(task, chosen):
        model, points = found
        cli.say(
            f"alarm: {model.name} is significantly better than the exported model on the test "
            f"photos ({points:+.1f} points); to export it:"
        )
        for stage in plan.export(task, model, task.out / f"{task.model.name}-{model.name}"):
            cli.say(cli.next_step(stage.words, label=f"  {stage.name}"))


def better(task: Task, exported: Path) -> tuple[Path, float] | None:
    """Find the first model of the report's alarm, and its difference in points, if there is one."""
    from rft.report import alarms
    from rft.report.page import compose
    from rft.report.read import load_runs

    report = compose(load_runs([task.out / "runs"]), draw=False, chosen=exported)
    assert report.chosen is not None
    for row, difference in alarms.better(report.shown, report.measures, report.chosen):
        path = next(run.path for run in report.runs if run.row == row.name)
        return path, 100 * difference.value
    return None
