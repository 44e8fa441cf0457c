"""Average fine-tuned weights: `python -m rft.merge {wise,uniform-soup,greedy-soup} ...`."""

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, assert_never, get_args

import tyro
from torch import Tensor

from rft import cli, dist, recipes
from rft import next_steps as commands
from rft.clip.model_folder import write_run
from rft.config import MAX_PIXELS, Device
from rft.loading.dataset import PackedDataset
from rft.merge import greedy
from rft.merge.ingredients import (
    Ingredient,
    best_known,
    check_alike,
    read_ingredient,
    read_soup,
    shared_seed,
)
from rft.method import averaging
from rft.recipes import MergeKind
from rft.runs import derived, filenames, trained_on
from rft.runs.filenames import LAST
from rft.sets import TRAIN_SET
from rft.shards.guard import require_no_test_images
from rft.storage import files
from rft.storage.documents import BatchSize, Megapixels, Whole, document

KINDS: tuple[MergeKind, ...] = get_args(MergeKind)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wise:
    """WiSE-FT: (1 - alpha) x zero-shot + alpha x fine-tuned, over every weight, head included.

    With one alpha, --out becomes the merged model's run folder; with several, it holds one run
    folder for each, named after its recipe: wise-ft-A, or wise-RECIPE-A where the fine-tuned model
    is another recipe than vanilla (the paper's WiSE-Ours is wise-object-mask-single-fill-A).
    """

    start: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="START")]
    """The zero-shot model: a run folder or a .safetensors file."""
    end: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="END")]
    """The fine-tuned model: a run folder or a .safetensors file."""
    out: Path
    """Run folder to make, or folder of run folders."""
    alpha: Annotated[tuple[float, ...], tyro.conf.arg(metavar="A...")] = (0.5,)
    """Shares of the fine-tuned model, in [0, 1]: 0.5, or 0 0.1 0.2 ... 1."""
    end_weights: Literal["best", "last"] = "best"
    """Weights of the fine-tuned run: selected by held-out accuracy (the last without held-out
    images), or after the last step, as the paper's released code takes them."""


@dataclass(frozen=True)
class UniformSoup:
    """Uniform soup: the mean of all models, over every weight, head included."""

    models: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL...")]
    """Two or more run folders or .safetensors files."""
    out: Path
    """Run folder to make."""


@document(name="--")
class GreedySoup:
    """Greedy soup: from the best run on, each next one is added if held-out accuracy rises.

    The held-out images are those that selected the runs' own checkpoints, so all runs must have the
    same: train them with one --split-seed. Several GPUs share the counting:
    `torchrun --nproc_per_node N -m rft.merge greedy-soup ...`
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Two or more run folders; of two equally good ones the last named is tried first."""
    data: str
    """Data root: the URL under which the tools wrote the set that the runs were trained on."""
    out: Path
    """Run folder to make."""
    batch_size: BatchSize = 256
    """Images in one forward."""
    workers: Whole = 4
    """Loader processes of each rank; 0 reads in the counting process."""
    max_pixels: Megapixels = MAX_PIXELS
    """Millions of pixels that an image may have; raise it if a set was packed so."""
    device: Device = "auto"


@dataclass(frozen=True)
class Arguments:
    """Average the weights of fine-tuned models. The same command again skips what is done."""

    merge: Annotated[
        Annotated[Wise, tyro.conf.subcommand(KINDS[0])]
        | Annotated[UniformSoup, tyro.conf.subcommand(KINDS[1])]
        | Annotated[GreedySoup, tyro.conf.subcommand(KINDS[2])],
        tyro.conf.arg(name=""),
    ]


def main() -> None:
    """Parse and merge."""
    options = sys.argv[1:] or ["--help"]
    if not options[0].startswith("-") and options[0] not in KINDS:
        raise cli.unknown("merge", options[0], KINDS)
    match cli.parse(Arguments, args=options, prog="rft.merge").merge:
        case Wise() as arguments:
            _wise(arguments)
        case UniformSoup() as arguments:
            _uniform_soup(arguments)
        case GreedySoup() as arguments:
            _make_greedy_soup(arguments)
        case arguments:
            assert_never(arguments)


def _wise(arguments: Wise) -> None:
    """Write the run folder of each interpolated model that does not exist yet."""
    _check_alphas(arguments.alpha)
    start, end = read_ingredient(arguments.start), _read_end(arguments)
    check_alike([start, end])
    several = len(arguments.alpha) > 1
    if several and (arguments.out / filenames.CONFIG).exists():
        raise ValueError(
            f"{arguments.out} is a run folder; with several --alpha it would hold one for each, "
            "choose another --out"
        )
    family = "ft" if end.recipe in ("", "vanilla") else end.recipe  # WiSE-FT is vanilla's name
    jobs: dict[Path, dict[str, Any]] = {}
    for alpha in arguments.alpha:
        config = {
            "recipe": f"wise-{family}-{alpha:g}",
            "seed": end.seed,
            "alpha": alpha,
            # recorded, because best and last weights of one run make different models
            "end_weights": arguments.end_weights if arguments.end.is_dir() else "file",
            "merged_from": [start.record(), end.record()],
        }
        jobs[arguments.out / config["recipe"] if several else arguments.out] = config
    # all of them are checked before the first is written
    done = {out for out, config in jobs.items() if derived.is_complete(out, config)}
    _check_ends(start, end)
    # a rerun reads no weights
    first, second = (start.load(), end.load()) if len(done) < len(jobs) else ({}, {})
    for out, config in jobs.items():
        if out not in done:
            state = averaging.interpolate(first, second, config["alpha"])
            _write(out, state, config, [start, end], end.saved.metadata)
        _report(out, out in done)
    cli.say(_next_step(jobs, end))


def _check_alphas(alphas: tuple[float, ...]) -> None:
    """Check that each alpha is a share and names a model of its own."""
    if not alphas:
        raise ValueError("--alpha needs at least one value in [0, 1]")
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise ValueError(f"--alpha is {alpha}; it must lie in [0, 1]")
    # as in the recipe, after which the folder of each is named
    names = [f"{alpha:g}" for alpha in alphas]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--alpha has {twice[0]} twice (six digits count); name each value once")


def _check_ends(start: Ingredient, end: Ingredient) -> None:
    """Check that WiSE goes from a model before its training to one after; warn if that is open."""
    # an imported model may have been trained by other code: its step 0 says nothing
    training_file = end.config is None and end.recipe in recipes.TRAINED
    untrained = end.steps == 0 and (end.is_training_run or training_file)
    if start.steps > 0 and untrained:
        raise ValueError(
            f"{start.path} was trained for {start.steps} steps and {end.path} for none: START is "
            "the zero-shot model, END the fine-tuned one; swap the two"
        )
    if start.steps > 0:
        log.warning(
            f"START {start.path} is not a zero-shot model: it was trained ({start.steps} steps)"
        )
    if untrained:
        log.warning(f"END {end.path} is not a fine-tuned model: it was not trained (0 steps)")


def _read_end(arguments: Wise) -> Ingredient:
    """Return the fine-tuned end with the weights that --end-weights names."""
    path = arguments.end
    if arguments.end_weights == "best":
        return read_ingredient(path)
    if not path.is_dir():
        raise ValueError(f"--end-weights last means a run folder's, but {path} is not a folder")
    if not (path / LAST).is_file():
        raise ValueError(f"{path} did not keep its last weights ({LAST}); use --end-weights best")
    return read_ingredient(path, LAST)


def _uniform_soup(arguments: UniformSoup) -> None:
    """Write the run folder of the mean of models unless it exists."""
    models = read_soup(arguments.models)
    config = {
        "recipe": "uniform-soup",
        "seed": shared_seed(models),
        "merged_from": [model.record() for model in models],
    }
    done = derived.is_complete(arguments.out, config)
    if not done:
        state = averaging.uniform_soup(model.load() for model in models)
        _write(arguments.out, state, config, models, _soup_metadata(models))
    _report(arguments.out, done)
    cli.say(_next_step([arguments.out], models[0]))


def _make_greedy_soup(arguments: GreedySoup) -> None:
    """Write the run folder of the greedy soup unless it exists."""
    runs = read_soup(arguments.runs)
    split = greedy.shared_split(runs)
    url = files.join(arguments.data, split.train_set)
    packed = PackedDataset(url, max_pixels=arguments.max_pixels)
    # what can be refused is checked before the ranks meet, so that none waits for another
    require_no_test_images(arguments.data, split.train_set, packed.manifest, packed.index.key)
    held_out = greedy.held_out_images(packed, split, runs)
    config = greedy.soup_config(runs, split, packed)
    done = derived.is_complete(arguments.out, config)
    world = dist.world_from_env()
    device = dist.pick_device(arguments.device, world)
    with dist.process_group(world, device) as world:
        # ranks of several machines may see different files under one path
        dist.require_agreement(world, "set of models and data", config)
        # rank 0 decides, because files may change while the others look at them
        done = dist.gather_objects(world, done)[0]
        if not done:
            state, config["soup"] = greedy.make_soup(
                runs,
                packed,
                held_out,
                world=world,
                device=device,
                batch_size=arguments.batch_size,
                workers=arguments.workers,
            )
            if world.is_main:  # every rank has the soup
                _write(arguments.out, state, config, runs, _soup_metadata(runs))
    if world.is_main:
        _report(arguments.out, done)
        cli.say(_next_step([arguments.out], runs[0]))


def _soup_metadata(models: Sequence[Ingredient]) -> dict[str, str]:
    """Return the metadata of a soup's weights: as many steps as the longest run took."""
    return {"step": str(max(model.steps for model in models))}


def _write(
    out: Path,
    state: dict[str, Tensor],
    config: dict[str, Any],
    models: Sequence[Ingredient],
    metadata: dict[str, str],
) -> None:
    """Write the run folder of an average of models, which has seen what any of them has."""
    # an image that any of them has seen is no test image for their average
    seen = trained_on.entries(set().union(*(model.seen for model in models)))
    metadata = {**metadata, **seen}
    architecture, classes = models[0].saved.architecture, best_known(models).saved.classes
    write_run(out, state, architecture, config, metadata, classes)


def _report(out: Path, done: bool) -> None:
    """Print whether a run folder was made or skipped."""
    cli.say(f"{'already merged' if done else 'merged'}: {out}")


def _next_step(outs: Iterable[Path], model: Ingredient) -> str:
    """Return the line with the next command, for the data that `model` was trained on."""
    data, train_set = (model.config.data, model.config.train_set) if model.config else ("", "")
    return commands.evaluation(list(outs), data, train_set or TRAIN_SET)
