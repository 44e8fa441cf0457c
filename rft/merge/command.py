"""Average fine-tuned weights: `python -m rft.merge {wise,uniform-soup,greedy-soup} ...`."""

import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, assert_never, get_args

import tyro
from torch import Tensor

from rft import cli, dist
from rft import next_steps as commands
from rft.averages import average
from rft.averages.average import Average, Parts
from rft.averages.ingredients import EndWeights, Ingredient, read_soup
from rft.clip.model_folder import write_run
from rft.config import MAX_PIXELS, Device
from rft.loading.dataset import PackedDataset
from rft.merge import greedy
from rft.recipes import MergeKind
from rft.runs import derived, filenames
from rft.sets import TRAIN_SET
from rft.shards.guard import require_no_test_images
from rft.storage import files
from rft.storage.documents import BatchSize, Megapixels, Whole, document

KINDS: tuple[MergeKind, ...] = get_args(MergeKind)


@dataclass(frozen=True)
class Wise:
    """WiSE-FT: (1 - alpha) x zero-shot + alpha x fine-tuned, over all weights or the tower only.

    With one alpha, --out becomes the merged model's run folder. With several, it contains one run
    folder for each, named after its recipe: wise-ft-A, or wise-RECIPE-A if the fine-tuned model's
    recipe is not vanilla (the paper's WiSE-Ours is wise-object-mask-single-fill-A); with --parts
    tower, wise-tower-A and wise-tower-RECIPE-A.
    """

    start: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="START")]
    """The zero-shot model: a run folder or a .safetensors file."""
    end: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="END")]
    """The fine-tuned model: a run folder or a .safetensors file."""
    out: Path
    """Run folder to create, or folder of run folders."""
    alpha: Annotated[tuple[float, ...], tyro.conf.arg(metavar="A...")] = (0.5,)
    """Shares of the fine-tuned model, in [0, 1]: 0.5, or 0 0.1 0.2 ... 1."""
    end_weights: EndWeights = "best"
    """Weights of the fine-tuned run: selected by held-out accuracy (the last without held-out
    images), or after the last step, as in the paper's released code."""
    parts: Parts = "all"
    """Interpolated weights: all, or only the image tower, with the head of the fine-tuned model.
    Alpha 1 is always the fine-tuned model; alpha 0 of the tower is not the zero-shot model."""


@dataclass(frozen=True)
class ModelStock:
    """Model Stock: the mean of fine-tuned models, pulled to the zero-shot one where they disagree.

    For each tensor the ratio is t = N c / (1 + (N - 1) c), with the mean pairwise cosine c of the N
    models' differences to START; the result is t x mean + (1 - t) x START. No images are needed.
    config.json records the ratios. If c is negative, the tensor is START's.
    """

    start: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="START")]
    """The zero-shot model that all others started from: a run folder or a .safetensors file."""
    models: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL...")]
    """Two or more fine-tuned models: run folders or .safetensors files."""
    out: Path
    """Run folder to make."""


@dataclass(frozen=True)
class UniformSoup:
    """Uniform soup: the mean of all models, over all weights including the head."""

    models: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL...")]
    """Two or more run folders or .safetensors files."""
    out: Path
    """Run folder to make."""


@document(name="--")
class GreedySoup:
    """Greedy soup: starting with the best run, add each next one if held-out accuracy rises.

    The held-out images are those that selected the runs' own checkpoints, so all runs must have the
    same ones: train them with one --split-seed. Several GPUs share the evaluation: `torchrun
    --nproc_per_node N -m rft.merge greedy-soup ...`
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Two or more run folders; of equally good ones the last named is tried first."""
    data: str
    """Data root: folder or URL with the packed set that the runs were trained on."""
    out: Path
    """Run folder to make."""
    batch_size: BatchSize = 256
    """Images per forward."""
    workers: Whole = 4
    """Loader processes per rank; 0 reads in the main process."""
    max_pixels: Megapixels = MAX_PIXELS
    """Limit on an image's size, in millions of pixels; raise it if a set was packed with more."""
    device: Device = "auto"


@dataclass(frozen=True)
class Arguments:
    """Average the weights of fine-tuned models. A rerun skips finished work."""

    merge: Annotated[
        Annotated[Wise, tyro.conf.subcommand(KINDS[0])]
        | Annotated[UniformSoup, tyro.conf.subcommand(KINDS[1])]
        | Annotated[GreedySoup, tyro.conf.subcommand(KINDS[2])]
        | Annotated[ModelStock, tyro.conf.subcommand(KINDS[3])],
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
        case ModelStock() as arguments:
            _model_stock(arguments)
        case arguments:
            assert_never(arguments)


def _wise(arguments: Wise) -> None:
    """Write the run folder of each interpolated model that does not exist yet."""
    ends = (arguments.start, arguments.end)
    found = average.wise(*ends, arguments.alpha, arguments.end_weights, "--alpha", arguments.parts)
    several = len(found) > 1
    if several and (arguments.out / filenames.CONFIG).exists():
        raise ValueError(
            f"{arguments.out} is a run folder, but several --alpha need a folder of run folders; "
            "choose another --out"
        )
    jobs = {arguments.out / one.name if several else arguments.out: one for one in found}
    done = _done(jobs)
    start, end = found[0].models
    average.warn_of_ends(start, end)
    _make(jobs, done, end)


def _uniform_soup(arguments: UniformSoup) -> None:
    """Write the run folder of the mean of models unless it exists."""
    soup = average.uniform_soup(arguments.models)
    jobs = {arguments.out: soup}
    _make(jobs, _done(jobs), soup.models[0])


def _model_stock(arguments: ModelStock) -> None:
    """Write the run folder of a Model Stock unless it exists."""
    stock = average.model_stock(arguments.start, arguments.models)
    jobs = {arguments.out: stock}
    done = _done(jobs)
    if not done:
        average.warn_of_ends(*stock.models)
    _make(jobs, done, stock.models[1])
    if not done:
        ratios = list(stock.config["stock"]["ratios"].values())
        kept = sum(ratio == 0 for ratio in ratios)
        cli.say(
            f"share of the fine-tuned mean: {min(ratios):.3f} to {max(ratios):.3f}, median "
            f"{statistics.median(ratios):.3f}, over {len(ratios)} tensors; {kept} stay START's"
        )


def _done(jobs: Mapping[Path, Average]) -> set[Path]:
    """Find the complete run folders; a folder with another model is an error."""
    # all folders are checked before the first is written
    return {out for out, one in jobs.items() if derived.is_complete(out, one.config)}


def _make(jobs: Mapping[Path, Average], done: set[Path], trained: Ingredient) -> None:
    """Write the missing run folders; `trained` names the data to evaluate on."""
    # lazy, so that a rerun reads no weights
    made = average.states(one for out, one in jobs.items() if out not in done)
    for out, one in jobs.items():
        if out not in done:
            _write(out, one, next(made))
        _report(out, out in done)
    cli.say_next(_next_step(jobs, trained))


def _make_greedy_soup(arguments: GreedySoup) -> None:
    """Write the run folder of the greedy soup unless it exists."""
    runs = read_soup(arguments.runs)
    split = greedy.shared_split(runs)
    url = files.join(arguments.data, split.train_set)
    packed = PackedDataset(url, max_pixels=arguments.max_pixels)
    # everything that may be refused is checked before the ranks meet, so that none waits in vain
    require_no_test_images(arguments.data, split.train_set, packed.manifest, packed.index.key)
    held_out = greedy.held_out_images(packed, split, runs)
    config = greedy.soup_config(runs, split, packed)
    soup = Average(runs, config, average.soup_metadata(runs))
    done = derived.is_complete(arguments.out, config)
    world = dist.world_from_env()
    device = dist.pick_device(arguments.device, world)
    with dist.process_group(world, device) as world:
        # ranks on several machines may see different files under one path
        dist.require_agreement(world, "set of models and data", config)
        # rank 0 decides, because files may change while others check them
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
                _write(arguments.out, soup, state)
    if world.is_main:
        _report(arguments.out, done)
        cli.say_next(_next_step([arguments.out], runs[0]))


def _write(out: Path, one: Average, state: dict[str, Tensor]) -> None:
    write_run(out, one.saved(state), one.config)


def _report(out: Path, done: bool) -> None:
    """Print whether a run folder was made or skipped."""
    cli.say(f"{'already merged' if done else 'merged'}: {out}")


def _next_step(outs: Iterable[Path], model: Ingredient) -> str:
    """Format the next command, for the data that `model` was trained on."""
    data, train_set = (model.config.data, model.config.train_set) if model.config else ("", "")
    return commands.evaluation(list(outs), data, train_set or TRAIN_SET)
