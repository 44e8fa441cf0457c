"""`--scale small`: a fixed rule that sets four numbers by the size of your own set.

Four of the paper's numbers assume a million images: held-out images, batch, warm-up and checkpoint
interval. The rule was chosen by reasoning (see its constants) before any accuracy was known;
`python -m benchmarks.small_sets` measured it afterwards (docs/results.md).
"""

import shlex
from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from rft.config import Config
from rft.storage import files

# A tenth of the images selects the epoch. Below 20 images, one image is more than 5 points and the
# best epoch is mostly luck. Above a fifth of the set (many classes with few images each), training
# loses more than the selection can gain. In both cases nothing is held out.
HELD_OUT_PART, HELD_OUT_LARGEST_PART, HELD_OUT_FEWEST, HELD_OUT_MOST = 10, 5, 20, 10_240
# The paper's schedule has 25,000 steps. 16 steps per epoch, 160 in ten epochs, are enough near the
# peak rate. Below 8 images the gradient is mostly noise and a fill has few donors; 64, also the
# miniature's batch, fits any GPU. Powers of two can be shared by 2, 4 or 8 ranks.
STEPS_PER_EPOCH, SMALLEST_BATCH, LARGEST_BATCH = 16, 8, 64
DONORS = 2  # images of a micro-batch that a fill needs
# A tenth of the steps is usual for short schedules; 500 is the paper's number.
WARMUP_PART, WARMUP_MOST = 10, 500
# One checkpoint per epoch, which is written anyway; more in long epochs, as in the paper.
CHECKPOINT_MOST = 500


class Size(NamedTuple):
    """Size of a training set, as input of the rule."""

    images: int
    classes: int
    """Classes that have images."""
    fewest: int
    """Number of images of the smallest of them."""

    def chosen(self, shots: int) -> "Size":
        """Size of the training images with this number of shots; 0 means all images."""
        return Size(shots * self.classes, self.classes, shots) if shots else self

    @staticmethod
    def of(labels: np.ndarray) -> "Size":
        """Count images and classes by the class ids of all images, (N,) with N > 0."""
        counts = np.unique(labels, return_counts=True)[1]
        return Size(int(counts.sum()), len(counts), int(counts.min()))


def _held_out(size: Size, shots: int) -> tuple[int, str]:
    """Choose how many images are held out to select the checkpoint; with the reason.

    A stratified split needs one image per class, and two of each class in the set. With shots, it
    is a tenth of their number, taken from the other images.
    """
    if 0 < size.fewest <= shots:
        return 0, "a class has no image besides its shots: last model used"
    size = size.chosen(shots)
    tenth = size.images // HELD_OUT_PART
    share = max(min(tenth, HELD_OUT_MOST), size.classes)
    if share < HELD_OUT_FEWEST:
        return 0, "too few images to select: last model used"
    if size.fewest < 2:
        return 0, "a class has only one image: last model used"
    if share * HELD_OUT_LARGEST_PART > size.images:
        return 0, f"one per class exceeds 1/{HELD_OUT_LARGEST_PART}: last model used"
    # more classes than a tenth of the images
    if size.classes > min(tenth, HELD_OUT_MOST):
        return share, "one per class"
    most = f", at most {HELD_OUT_MOST:,}" if tenth > HELD_OUT_MOST else ""
    return share, f"1/{HELD_OUT_PART} of the images{most}"


def batch_size(images: int, parts: int) -> int:
    """Choose the global batch for `images` training images in `parts` ranks x micro-batches."""
    batch = SMALLEST_BATCH
    while batch < LARGEST_BATCH and images >= 2 * batch * STEPS_PER_EPOCH:
        batch *= 2
    # fewer images than the smallest batch
    while batch > max(images, 1):
        batch //= 2
    # the same for 1, 2 or 4 ranks, so that a run may resume on any of these
    if batch % parts or batch < DONORS * parts:
        batch = parts * max(DONORS, batch // parts) if parts > 1 else batch
    return batch


def _fewest_images(config: Config, parts: int) -> int:
    """Find the smallest batch that `parts` ranks x micro-batches can share."""
    if not config.method.masks or config.method.fill == "none":
        return parts
    return max(parts, DONORS) if config.method.donors == "global" else DONORS * parts


def _shared_batch(config: Config, images: int, ranks: int) -> tuple[int, str]:
    """Choose the batch for `images` training images; with the reason.

    If there are too few images for the ranks, the batch is larger than their number.
    """
    parts = ranks * config.optim.accumulate
    alone, batch = batch_size(images, 1), batch_size(images, parts)
    if batch > images:  # one image per rank is enough if no fill needs a second one
        batch = _fewest_images(config, parts)
    steps = images // alone
    if batch != alone:
        return batch, f"{batch // parts} for each of {parts} ranks x micro-batches"
    if batch < SMALLEST_BATCH:
        return batch, f"{images} image{'s' if images != 1 else ''} to train on"
    if steps < STEPS_PER_EPOCH:
        return batch, f"the smallest; {steps} of {STEPS_PER_EPOCH} steps per epoch"
    if steps >= 2 * STEPS_PER_EPOCH:
        return batch, f"the largest; {steps:,} steps per epoch"
    return batch, f"for at least {STEPS_PER_EPOCH} steps per epoch"


def _require_enough(config: Config, images: int, ranks: int) -> None:
    """Check that the ranks can share `images` training images."""
    accumulate = config.optim.accumulate
    fewest = _fewest_images(config, ranks * accumulate)
    if not 0 < images < fewest:  # 0 is refused when the set is split
        return
    what = f"{images} image{'s' if images > 1 else ''} to train on"
    who = f"{ranks} rank{'s' if ranks > 1 else ''}"
    who += f" x {accumulate} micro-batches" if accumulate > 1 else ""
    why = f", of which each needs {DONORS} for its fills" if fewest > ranks * accumulate else ""
    # fewer ranks, with the same number of micro-batches, which is a separate option
    fitting = [n for n in range(1, ranks) if _fewest_images(config, n * accumulate) <= images]
    hint = f"start at most {fitting[-1]}" if fitting else "add images"
    raise ValueError(f"{what} cannot be shared by {who}{why}; {hint}")


def _to_train(config: Config, size: Size) -> int:
    """Count the training images; 0 for impossible options, which the split refuses."""
    if config.loader.shots:
        return size.chosen(config.loader.shots).images
    return max(0, size.images - config.loader.held_out)


def rule(config: Config, size: Size, ranks: int) -> dict[str, int]:
    """Apply the rule: four numbers by option name, none for other scales.

    Each number is computed from the values of the earlier ones in `config`, so that an option on
    the command line (a different batch) affects the numbers that depend on it (steps, warm-up).
    """
    return {option: number for option, (number, _) in _rule(config, size, ranks).items()}


def _rule(config: Config, size: Size, ranks: int) -> dict[str, tuple[int, str]]:
    """Apply the rule; each number with its reason."""
    if config.scale != "small":
        return {}
    loader, optim = config.loader, config.optim
    left = _to_train(config, size)
    epoch = left // loader.batch_size
    steps = optim.epochs * epoch
    return {
        "loader.held_out": _held_out(size, loader.shots),
        "loader.batch_size": _shared_batch(config, left, ranks),
        "optim.warmup_steps": (
            min(steps // WARMUP_PART, WARMUP_MOST),
            f"1/{WARMUP_PART} of {steps:,} steps, at most {WARMUP_MOST}",
        ),
        "log.checkpoint_steps": (
            min(max(epoch, 1), CHECKPOINT_MOST),
            f"an epoch, at most {CHECKPOINT_MOST} steps",
        ),
    }


OPTIONS = ("loader.held_out", "loader.batch_size", "optim.warmup_steps", "log.checkpoint_steps")


def fit(config: Config, size: Size, ranks: int, named: Collection[str] = ()) -> Config:
    """Fill in the rule's numbers, except for options named on the command line.

    Args:
        config: of `--scale small`; its values of the rule's options are used only for those in
            `named`.
        size: of the training set.
        ranks: processes that share a batch.
        named: options among `OPTIONS` that keep their value.

    Raises:
        ValueError: if there are too many ranks for the images.
    """
    for option in OPTIONS:  # in order: each is computed from those before it
        if option not in named:
            if option == "loader.batch_size":
                _require_enough(config, _to_train(config, size), ranks)
            group, name = option.split(".")
            changed = replace(getattr(config, group), **{name: rule(config, size, ranks)[option]})
            config = replace(config, **{group: changed})
    return config


def rule_in_words(config: Config, size: Size, ranks: int) -> list[str]:
    """Describe the rule's values for this set, one line each, for the dry run and the start.

    Other scales have no lines.
    """
    numbers = _rule(config, size, ranks)
    if not numbers:
        return []
    chosen = size.chosen(config.loader.shots)
    lines = [
        f"--scale small for {chosen.images:,} images of {size.classes:,} classes on {ranks} "
        f"rank{'s' if ranks > 1 else ''}:"
    ]
    for option, (number, reason) in numbers.items():
        group, name = option.split(".")
        value = getattr(getattr(config, group), name)
        why = reason if value == number else f"given; the rule's is {number:,}"
        lines.append(f"  {option:20s} {value:6,}  ({why})")
    return lines


def repeat_options(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Format the options that resume a run, for an error message.

    Numbers that follow from other options are only named if nothing else differs.

    Args:
        old: the recorded identity.
        new: the identity that differs from it.
    """
    changed = {name: was for name, was, _ in files.differing(old, new) if name != "precision"}
    # recipe, scale and preset decide the defaults of the others; the recipe is no option
    if "recipe" in changed:
        return ""
    if defaults := changed.keys() & {"scale", "preset"}:
        changed = {name: changed[name] for name in sorted(defaults)}
    ruled = set(OPTIONS) if old["scale"] == new["scale"] == "small" else set()
    derived = {*ruled, "split_seed", "order_seed"}
    given = {name: was for name, was in changed.items() if name not in derived} or changed
    # lists and switches are written differently, and rarely given
    options = [
        f"--{name.replace('_', '-')} {shlex.quote(str(was))}"
        for name, was in given.items()
        if type(was) in (str, int, float)
    ]
    if not options:
        return ""
    rule = "; --scale small takes them from the size of the set and the ranks"
    return f" ({' '.join(options)}{rule if ruled.issuperset(given) else ''})"
