"""Choose a model by held-out images: `python -m rft.merge.choose RUN... --data URL`.

All models are evaluated on the images that the runs held out in training, averages without writing
their weights. No test image is used. These images also selected the epoch of each fine-tuned model,
so its count is slightly too high; a tie therefore goes to the model closest to the pre-trained one.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import tyro

from rft import cli, dist, next_steps
from rft.averages.ingredients import EndWeights, read_ingredient
from rft.config import MAX_PIXELS, Device
from rft.dist import World
from rft.evaluate.checkpoints import Loaded, load_checkpoints, require_classes
from rft.evaluate.count import Count, count_correct
from rft.evaluate.unwritten import System, Unwritten, path_of, read_averages
from rft.loading.dataset import PackedDataset
from rft.merge.greedy import held_out_images, shared_split
from rft.runs import choice, records
from rft.runs.choice import Candidate, Choice
from rft.runs.derived import merge_words
from rft.runs.records import RunConfig
from rft.shards.guard import require_no_test_images
from rft.storage import documents, files
from rft.storage.documents import BatchSize, Megapixels, Whole, document


@document(name="--")
class Arguments:
    """Choose the model that is right on most held-out images; no test set is used.

    A rerun evaluates nothing if --save holds the choice among the same runs. Of equally good models
    an untrained one comes first, then averages, then fine-tuned models, each in the order given.
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...")]
    """Training runs that held out the same images."""
    data: str
    """Data root: folder or URL with the packed set that the runs were trained on."""
    wise: Annotated[
        tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]],
        tyro.conf.arg(metavar="START END A..."),
    ] = ()
    """Also WiSE-FT models of these ends and alphas, averaged in memory."""
    out: Path | None = None
    """Folder of the averages' run folders, as for `rft.evaluate --wise`."""
    save: Path
    """JSON file for the counts and the choice."""
    end_weights: EndWeights = "best"
    """Weights of each END of --wise: selected, or of the last step."""
    batch_size: BatchSize = 256
    """Images per forward."""
    workers: Whole = 4
    """Loader processes; 0 reads in the main process."""
    max_pixels: Megapixels = MAX_PIXELS
    """Limit on an image's size, in millions of pixels."""
    device: Device = "auto"


class Standing(NamedTuple):
    """Sort key of a candidate; the smallest is chosen."""

    wrong: int
    kind: int
    """0 for an untrained model, 1 for an average, 2 for a fine-tuned one."""
    place: int

    @staticmethod
    def of(place: int, one: Loaded, count: Count) -> "Standing":
        """Compute the standing of the candidate named at position `place`."""
        config = records.find_config(one.path)
        # an average may also be given as a written run folder
        merged = one.average is not None or (config is not None and config.merged_from is not None)
        trained = 0 if int(one.saved.metadata["step"]) == 0 else 2
        return Standing(count.total - count.correct, 1 if merged else trained, place)


def choose(
    systems: list[System],
    packed: PackedDataset,
    held_out: np.ndarray,
    arguments: Arguments,
    world: World,
    device: torch.device,
) -> Choice:
    """Evaluate every candidate and choose."""
    loaded, models = load_checkpoints(systems, world, device)
    counts = count_correct(
        models,
        packed,
        image_size=models[0].architecture.image_size,
        world=world,
        device=device,
        samples=held_out,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        names=[str(one.path) for one in loaded],
    )
    standings = [Standing.of(n, *pair) for n, pair in enumerate(zip(loaded, counts, strict=True))]
    return Choice(
        train_set=packed.manifest.dataset,
        manifest_sha256=packed.manifest.sha256,
        images=counts[0].total,
        candidates=tuple(
            Candidate(path=str(one.path), sha256=one.sha256, correct=count.correct)
            for one, count in zip(loaded, counts, strict=True)
        ),
        chosen=str(loaded[min(standings).place].path),
    )


def _known(arguments: Arguments, manifest_sha256: str) -> Choice | None:
    """Read the choice in --save; None unless it was made among these runs on this data."""
    try:
        found = choice.read(arguments.save)
    except ValueError:  # missing, or not a choice: rewritten
        return None
    same = [one.path for one in found.candidates] == list(map(str, arguments.runs))
    same = same and found.manifest_sha256 == manifest_sha256
    return found if same and choice.is_current(found) else None


def main() -> None:
    """Parse, evaluate, write the choice."""
    arguments = cli.parse(Arguments, prog="rft.merge.choose")
    systems = [
        *arguments.runs,
        *read_averages(arguments.wise, (), arguments.out, arguments.end_weights),
    ]
    runs = [read_ingredient(path) for path in arguments.runs]
    if len(systems) < 2:
        raise ValueError("name at least two models to choose from")
    split = shared_split(runs)
    packed = PackedDataset(
        files.join(arguments.data, split.train_set), max_pixels=arguments.max_pixels
    )
    require_no_test_images(arguments.data, split.train_set, packed.manifest, packed.index.key)
    # with --wise the candidates include averages, which `_known` does not compare
    if not arguments.wise and (known := _known(arguments, packed.manifest.sha256)):
        cli.say(f"already chosen by held-out images: {known.chosen}")
        _say_next(known, systems, arguments)
        return
    require_classes(systems, {split.train_set: packed})
    held_out = held_out_images(packed, split, runs)
    world = World(rank=0, size=1, local_rank=0)
    device = dist.pick_device(arguments.device, world)
    found = choose(systems, packed, held_out, arguments, world, device)
    for one in found.candidates:
        cli.say(f"{one.path}: {one.correct} of {found.images} held-out images")
    files.write_json(str(arguments.save), asdict(found))
    cli.say(f"chosen by held-out images: {found.chosen}")
    _say_next(found, systems, arguments)


def _say_next(found: Choice, systems: Sequence[System], arguments: Arguments) -> None:
    """Print the commands that export the chosen model, and report on all."""
    chosen, merge = Path(found.chosen), list[str]()
    system = next(one for one in systems if path_of(one) == chosen)
    if isinstance(system, Unwritten):
        config = system.average.config
        read = replace(documents.convert(config, RunConfig, str(chosen)), whole=config)
        merge = merge_words(chosen, read)
    models = [Path(one.path) for one in found.candidates]
    cli.say_next(next_steps.after_choice(chosen, models, arguments.data, arguments.save, merge))


if __name__ == "__main__":
    cli.run(main)
