"""`--scale small`: training numbers that follow from the size of one's own set, by a fixed rule.

Four numbers of the paper assume a million images: how many are held out, the batch, the warm-up and
how often a checkpoint is written. The rule was chosen by reasoning (see its constants) before any
accuracy was known; `python -m benchmarks.small_sets` measured it afterwards (docs/results.md).
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from rft.config import Config

# A tenth selects the epoch. Below 20 images one of them is more than 5 points, and the best epoch
# is the luckiest; beyond a fifth of the set (many classes, few images each) training lacks more
# than the selection can bring. In both cases nothing is held out.
HELD_OUT_PART, HELD_OUT_LARGEST_PART, HELD_OUT_FEWEST, HELD_OUT_MOST = 10, 5, 20, 10_240
# The paper's schedule has 25,000 steps. 16 per epoch, 160 in ten epochs, leave the peak rate enough
# of them. Below 8 images the gradient is mostly noise and a fill has few donors; with 64 (the
# miniature's batch, too) memory is small on any GPU. Powers of two can be shared by 2, 4, 8 ranks.
STEPS_PER_EPOCH, SMALLEST_BATCH, LARGEST_BATCH = 16, 8, 64
DONORS = 2  # images of a micro-batch that a fill needs
# A tenth of the steps is the usual share for few steps; 500 are the paper's.
WARMUP_PART, WARMUP_MOST = 10, 500
# One checkpoint per epoch, which is written anyway; more in long epochs, as in the paper.
CHECKPOINT_MOST = 500


class Size(NamedTuple):
    """A training set as the rule sees it."""

    images: int
    classes: int
    """Classes that have images."""
    fewest: int
    """Images of the smallest of them."""

    def chosen(self, shots: int) -> "Size":
        """Return the size of what is trained on with so many shots; 0 are none."""
        return Size(shots * self.classes, self.classes, shots) if shots else self

    @staticmethod
    def of(labels: np.ndarray) -> "Size":
        """Count the class ids of all images of a set, (N,); a set has at least one."""
        counts = np.unique(labels, return_counts=True)[1]
        return Size(int(counts.sum()), len(counts), int(counts.min()))


def _held_out(size: Size, shots: int) -> tuple[int, str]:
    """Return how many training images should select the checkpoint, and what decided it.

    A stratified split needs one of each class, and two of it in the set. With shots it is a tenth
    of the shots, and taken from the other images.
    """
    if 0 < size.fewest <= shots:
        return 0, "a class has no image besides its shots: last model used"
    size = size.chosen(shots)
    tenth = size.images // HELD_OUT_PART
    share = max(min(tenth, HELD_OUT_MOST), size.classes)
    if share < HELD_OUT_FEWEST:
        return 0, "too few to select by: the last model is used"
    if size.fewest < 2:
        return 0, "a class has only one image: last model used"
    if share * HELD_OUT_LARGEST_PART > size.images:
        return 0, f"one per class exceeds 1/{HELD_OUT_LARGEST_PART}: last model used"
    # more classes than a tenth has images
    if size.classes > min(tenth, HELD_OUT_MOST):
        return share, "one per class"
    most = f", at most {HELD_OUT_MOST:,}" if tenth > HELD_OUT_MOST else ""
    return share, f"1/{HELD_OUT_PART} of the images{most}"


def batch_size(images: int, parts: int) -> int:
    """Return the global batch for so many images to train on, in so many ranks x micro-batches."""
    batch = SMALLEST_BATCH
    while batch < LARGEST_BATCH and images >= 2 * batch * STEPS_PER_EPOCH:
        batch *= 2
    # fewer images than the smallest batch
    while batch > max(images, 1):
        batch //= 2
    # as it is for 1, 2, 4 ranks, so that a run may resume on any of these
    if batch % parts or batch < DONORS * parts:
        batch = parts * max(DONORS, batch // parts) if parts > 1 else batch
    return batch


def _fewest_images(config: Config, parts: int) -> int:
    """Return the smallest batch that so many ranks x micro-batches can share."""
    if not config.method.masks or config.method.fill == "none":
        return parts
    return max(parts, DONORS) if config.method.donors == "global" else DONORS * parts


def _shared_batch(config: Config, images: int, ranks: int) -> tuple[int, str]:
    """Return the batch for so many images, and what decided it.

    It is larger than they are if they are too few.
    """
    parts = ranks * config.optim.accumulate
    alone, batch = batch_size(images, 1), batch_size(images, parts)
    if batch > images:  # an image each is enough where no fill needs a second one
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
    """Check that so many images to train on can be shared by the ranks."""
    accumulate = config.optim.accumulate
    fewest = _fewest_images(config, ranks * accumulate)
    if not 0 < images < fewest:  # none is refused where the set is split
        return
    what = f"{images} image{'s' if images > 1 else ''} to train on"
    who = f"{ranks} rank{'s' if ranks > 1 else ''}"
    who += f" x {accumulate} micro-batches" if accumulate > 1 else ""
    why = f", of which each needs {DONORS} for its fills" if fewest > ranks * accumulate else ""
    # with the same number of micro-batches, which is an option of its own
    fitting = [n for n in range(1, ranks) if _fewest_images(config, n * accumulate) <= images]
    hint = f"start at most {fitting[-1]}" if fitting else "add images"
    raise ValueError(f"{what} cannot be shared by {who}{why}; {hint}")


def _to_train(config: Config, size: Size) -> int:
    """Return how many images are trained on; 0 for nonsense, refused where the set is split."""
    if config.loader.shots:
        return size.chosen(config.loader.shots).images
    return max(0, size.images - config.loader.held_out)


def rule(config: Config, size: Size, ranks: int) -> dict[str, int]:
    """Return the rule's four numbers by option name; other scales have none.

    Each is computed from those before it as `config` has them, so that an option on the command
    line (a different batch) carries over to the numbers that depend on it (steps, warm-up).
    """
    return {option: number for option, (number, _) in _rule(config, size, ranks).items()}


def _rule(config: Config, size: Size, ranks: int) -> dict[str, tuple[int, str]]:
    """Return the numbers of `rule`, each with what decided it."""
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
    """Return a configuration with the rule's numbers, except for options named on the command line.

    Args:
        config: of `--scale small`; its numbers of the rule count only where they are named.
        size: of the training set.
        ranks: processes that share a batch.
        named: options among `OPTIONS` that keep the value they have.

    Raises:
        ValueError: if the ranks are too many for the images.
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
    """Return the rule with its values for this set, for the dry run and the start, one line each.

    Other scales have no line.
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


def repeat_numbers(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Name the options that resume a run with its recorded numbers, for an error message.

    Args:
        old: the recorded identity.
        new: the identity that differs from it, in these numbers or in something else.
    """
    if new["scale"] != "small" or old["scale"] != "small":
        return ""
    options = []
    for option in OPTIONS:
        group, name = option.split(".")
        before, now = (identity.get(group, {}).get(name) for identity in (old, new))
        if before != now:
            options.append(f"--{option.replace('_', '-')} {before}")
    if not options:
        return ""
    return (
        f" ({' '.join(options)}; --scale small takes them from the size of the set and the ranks)"
    )
