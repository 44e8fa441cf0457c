"""The numbers of `--scale small` as a function of the size of the set."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rft import recipes, small
from rft.config import Config
from rft.loading.order import Plan
from rft.loading.split import held_out_split
from rft.small import Size

NUMBERS = ("held_out", "batch_size", "warmup_steps", "checkpoint_steps")


def numbers(config: Config) -> tuple[int, ...]:
    """The rule's numbers of a configuration, in the order of NUMBERS."""
    loader = config.loader
    return (
        *(loader.held_out, loader.batch_size),
        *(config.optim.warmup_steps, config.log.checkpoint_steps),
    )


def fitted(
    size: Size, ranks: int = 1, recipe: str = "vanilla", shots: int = 0, **optim: int
) -> Config:
    config = recipes.build(recipe, scale="small", data="d", run="r")
    config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, shots=shots))
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, **optim))
    return small.fit(config, size, ranks)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        # too few for selection: 6 images are not a tenth, 16 (one per class) more than a fifth
        (Size(60, 16, 3), (0, 8, 7, 7)),
        (Size(300, 16, 18), (30, 16, 16, 16)),
        (Size(3000, 16, 187), (300, 64, 42, 42)),
        (Size(300, 100, 3), (0, 16, 18, 18)),
        # a stratified split needs two images of a class
        (Size(3000, 16, 1), (0, 64, 46, 46)),
        (Size(199, 2, 80), (0, 8, 24, 24)),
        (Size(200, 2, 80), (20, 8, 22, 22)),
        # large sets get the paper's numbers
        (Size(1_281_167, 1000, 732), (10_240, 64, 500, 500)),
        (Size(3, 2, 1), (0, 2, 1, 1)),
        (Size(1, 1, 1), (0, 1, 1, 1)),
    ],
)
def test_the_rule(size, expected):
    assert numbers(fitted(size)) == expected


@pytest.mark.parametrize(
    ("size", "shots", "expected"),
    [
        # as the rule gives for a set of so many images, all of which are used for training
        (Size(3000, 16, 187), 16, (25, 16, 16, 16)),
        (Size(1_281_167, 1000, 732), 16, (1600, 64, 250, 250)),
        # one image of each class is more than a fifth
        (Size(1_281_167, 1000, 732), 4, (0, 64, 62, 62)),
        (Size(1_281_167, 1000, 732), 1, (0, 32, 31, 31)),
        # the smallest class has nothing left to hold out
        (Size(3000, 16, 16), 16, (0, 16, 16, 16)),
        (Size(3000, 16, 17), 16, (25, 16, 16, 16)),
        # its shots cannot be drawn, which is refused when the set is split
        (Size(3000, 16, 3), 16, (0, 16, 16, 16)),
    ],
)
def test_the_rule_follows_from_the_shots(size, shots, expected):
    config = fitted(size, shots=shots)
    assert numbers(config) == expected
    (first, *_) = small.rule_in_words(config, size, 1)
    assert first.startswith(
        f"--scale small for {shots * size.classes:,} images of {size.classes:,}"
    )


def test_shots_are_shared_by_ranks():
    with pytest.raises(ValueError, match="4 images to train on cannot be shared by 8 ranks"):
        fitted(Size(3000, 4, 100), ranks=8, shots=1)


@pytest.mark.slow
@settings(deadline=None)
@given(
    images=st.integers(1, 3000),
    classes=st.integers(1, 30),
    ranks=st.sampled_from([1, 2, 3, 4, 8]),
    accumulate=st.sampled_from([1, 1, 2, 3]),
    epochs=st.integers(0, 20),
    recipe=st.sampled_from([recipes.DEFAULT, "vanilla"]),
)
def test_every_set_gets_numbers_that_training_takes(
    images, classes, ranks, accumulate, epochs, recipe
):
    labels = np.arange(images) % classes
    size = Size.of(labels)
    each = 2 if recipe == recipes.DEFAULT else 1
    if images < each * ranks * accumulate:  # so few are never held out
        with pytest.raises(ValueError, match="cannot be shared by"):
            fitted(size, ranks, recipe, epochs=epochs, accumulate=accumulate)
        return
    config = fitted(size, ranks, recipe, epochs=epochs, accumulate=accumulate)
    held_out, batch, warmup, checkpoint = numbers(config)
    keys = np.array([f"{n:05d}".encode() for n in range(images)])
    train, held = held_out_split(keys, labels, held_out, 0)
    assert (len(train), len(held)) == (images - held_out, held_out)
    assert held_out == 0 or 20 <= held_out <= images / 5
    steps = Plan(shard_sizes=(len(train),), batch_size=batch, seed=0).steps_per_epoch
    assert warmup <= epochs * steps / 10
    assert checkpoint == min(steps, 500)
    assert config.micro_batch(ranks) >= each


@pytest.mark.parametrize(
    ("images", "ranks", "accumulate", "recipe", "message"),
    [
        (2, 2, 1, recipes.DEFAULT, "2 images to train on .* 2 ranks, .* needs 2 .* at most 1$"),
        (7, 4, 1, recipes.DEFAULT, "7 images to train on .* 4 ranks, .* needs 2 .* at most 3$"),
        (7, 2, 2, recipes.DEFAULT, "by 2 ranks x 2 micro-batches, of which .* at most 1$"),
        (1, 1, 1, recipes.DEFAULT, "1 image to train on .* by 1 rank, .*; add images$"),
        (2, 4, 1, "vanilla", "by 4 ranks; start at most 2$"),
    ],
)
def test_ranks_that_are_too_many_for_the_images(images, ranks, accumulate, recipe, message):
    size = Size(images, min(images, 2), 1)
    with pytest.raises(ValueError, match=message):
        fitted(size, ranks, recipe, accumulate=accumulate)


@pytest.mark.parametrize(("images", "ranks"), [(2, 2), (3, 2), (3, 3), (7, 4)])
def test_an_image_for_each_rank_is_enough_without_fills(images, ranks):
    size = Size(images, 2, 1)
    config = fitted(size, ranks, "vanilla")
    assert config.loader.batch_size == ranks
    assert config.micro_batch(ranks) == 1
    (line,) = (line for line in small.rule_in_words(config, size, ranks) if "batch_size" in line)
    assert line.endswith(f"({images} images to train on)") or "(1 for each of" in line


def test_global_donors_are_enough_for_fills():
    config = recipes.build(recipes.DEFAULT, scale="small", data="d", run="r")
    method = dataclasses.replace(config.method, donors="global")
    config = small.fit(dataclasses.replace(config, method=method), Size(2, 2, 1), 2)
    assert config.loader.batch_size == 2
    assert config.micro_batch(2) == 1


@given(images=st.integers(8, 5000), ranks=st.sampled_from([2, 4]))
def test_few_ranks_have_the_batch_of_one(images, ranks):
    # so that a run can resume on a different number of them
    assert small.batch_size(images, ranks) == small.batch_size(images, 1)


def test_what_the_command_line_names_stays_and_carries_over():
    config = recipes.build("vanilla", scale="small", data="d", run="r")
    loader = dataclasses.replace(config.loader, batch_size=4)
    config = dataclasses.replace(config, loader=loader)
    size = Size(300, 6, 50)
    assert numbers(small.fit(config, size, 1, {"loader.batch_size"})) == (30, 4, 67, 67)
    named = set(small.OPTIONS)
    assert small.fit(config, size, 1, named) == config
    shown = small.rule_in_words(small.fit(config, size, 1, {"loader.batch_size"}), size, 1)
    (line,) = (line for line in shown if "batch_size" in line)
    assert line.split() == ["loader.batch_size", "4", "(given;", "the", "rule's", "is", "16)"]


def test_every_line_of_the_rule_fits_a_terminal_and_has_its_value():
    size = Size(1_281_167, 1000, 732)
    config = fitted(size, 8)
    first, *lines = small.rule_in_words(config, size, 8)
    assert first == "--scale small for 1,281,167 images of 1,000 classes on 8 ranks:"
    for option, value, line in zip(small.OPTIONS, numbers(config), lines, strict=True):
        assert line.split()[:2] == [option, f"{value:,}"]


HELD_OUT_REASONS = {
    Size(60, 16, 3): "too few images to select: last model used",
    Size(209, 12, 1): "a class has only one image: last model used",
    Size(300, 100, 3): "one per class exceeds 1/5: last model used",
    Size(300, 50, 6): "one per class",
    Size(300, 16, 18): "1/10 of the images",
    Size(1_281_167, 1000, 732): "1/10 of the images, at most 10,240",
}
BATCH_REASONS = {
    (1, 1): "1 image to train on",
    (2, 1): "2 images to train on",
    (48, 1): "the smallest; 6 of 16 steps per epoch",
    (128, 1): "for at least 16 steps per epoch",
    (1200, 4): "for at least 16 steps per epoch",
    (3000, 1): "the largest; 46 steps per epoch",
    (48, 16): "2 for each of 16 ranks x micro-batches",
    (3000, 3): "21 for each of 3 ranks x micro-batches",
}


@pytest.mark.parametrize(
    ("size", "parts", "option", "reason"),
    [
        *((size, 1, "held_out", why) for size, why in HELD_OUT_REASONS.items()),
        # a class with a single image: none is held out
        *((Size(n, 1, 1), parts, "batch_size", why) for (n, parts), why in BATCH_REASONS.items()),
    ],
)
def test_the_reason_is_what_decided(size, parts, option, reason):
    for ranks, accumulate in ((1, parts), (parts, 1)):
        config = fitted(size, ranks, accumulate=accumulate)
        lines = small.rule_in_words(config, size, ranks)
        # in the dry run two more columns are taken
        assert max(map(len, lines)) <= 78
        (line,) = (line for line in lines if option in line)
        assert line.endswith(f"  ({reason})")


@pytest.mark.parametrize("scale", ["paper", "miniature"])
def test_other_scales_have_no_rule(scale):
    config = recipes.build("vanilla", scale=scale)
    assert small.rule(config, Size(60, 16, 3), 1) == {}
    assert small.rule_in_words(config, Size(60, 16, 3), 1) == []


def test_without_a_size_no_small_set_can_be_trained():
    # the split refuses the paper's numbers, so they cannot pass for the rule's
    config = recipes.build("vanilla", scale="small")
    assert config.loader == recipes.build("vanilla").loader


def test_a_run_whose_set_has_grown_is_resumed_by_naming_its_numbers():
    old, new = (fitted(Size(n, 6, n // 6)).identity() for n in (300, 600))
    hint = small.repeat_options(old, new)
    assert hint.startswith(" (--loader.batch-size 16 --loader.held-out 30; --scale small takes")
    assert small.repeat_options(old, old) == ""
    assert small.repeat_options({**old, "scale": "paper"}, new) == " (--scale paper)"


def test_a_run_is_resumed_by_the_options_that_were_given():
    size = Size(300, 6, 50)

    def identity(recipe="vanilla", **optim):
        config = recipes.build(recipe, scale="small")
        optim = dataclasses.replace(config.optim, **optim)
        return small.fit(dataclasses.replace(config, optim=optim), size, 1).identity()

    old = identity(epochs=3)
    # the warm-up follows from the epochs
    assert old["optim"]["warmup_steps"] != identity(epochs=9)["optim"]["warmup_steps"]
    assert small.repeat_options(old, identity(epochs=9)) == " (--optim.epochs 3)"
    assert small.repeat_options(old, identity(epochs=9, lr=1.0)) == (
        f" (--optim.epochs 3 --optim.lr {old['optim']['lr']})"
    )
    seeds = {"seed": 1, "split_seed": 1, "order_seed": 1}
    assert small.repeat_options(old, {**old, **seeds}) == " (--seed 0)"
    assert small.repeat_options(old, {**old, "split_seed": 1}) == " (--split-seed 0)"
    assert small.repeat_options(old, {**old, "precision": "bf16"}) == ""
    assert small.repeat_options(old, identity("no-mask")) == ""
